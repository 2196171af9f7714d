"""Draw the course's pictures: ``python imgs/draw.py [run directory] [run directory]``.

Without an argument the sketch of the one page that cannot be visited (``take.py`` takes the others
from a real JupyterLab); with the directories of a finished ``make course`` and ``make course-real``
also their four answers for the README, ``four_answers_tiny.svg`` and ``four_answers_smollm2.svg``.
"""

import html
import json
import re
import sys
from pathlib import Path

IMGS = Path(__file__).parent
BLUE, ORANGE, INK, LINE, PAPER = "#0072b2", "#d55e00", "#222222", "#b5b5b5", "#ffffff"
FONTS = "'Noto Sans CJK SC','Noto Sans SC','Microsoft YaHei','PingFang SC',sans-serif"


def svg(width: int, height: int, title: str, *parts: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="{FONTS}" role="img"><title>{html.escape(title)}</title>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}" stroke="{LINE}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(
    x: float, y: float, words: str, size: int = 14, colour: str = INK, anchor: str = "start"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{html.escape(words)}</text>'


def box(
    x: float,
    y: float,
    w: float,
    h: float,
    label: str = "",
    fill: str = "#f5f5f5",
    colour: str = INK,
) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{LINE}"/>'
        + text(x + w / 2, y + h / 2 + 5, label, 14, colour, "middle")
    )


def here(x: float, y: float, w: float, h: float) -> str:
    """The frame around what is to be clicked."""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="none" stroke="{ORANGE}" stroke-width="3"/>'


SKETCHES = {
    "ui_1_1_gpu_environment": svg(
        640, 290, "示意图：魔搭的“我的 Notebook”页面，选择方式二，GPU 环境，再点启动",
        box(0, 0, 640, 34, "我的 Notebook（示意图，文字以页面为准）", "#eeeeee"),
        box(30, 60, 270, 170, ""), text(165, 92, "方式一：CPU 环境", 16, "#777777", "middle"),
        box(330, 60, 280, 170, ""), text(470, 92, "方式二：GPU 环境", 16, anchor="middle"),
        text(470, 132, "免费多少小时，以页面上写的为准", 14, "#777777", "middle"),
        box(410, 166, 120, 40, "启动", BLUE, PAPER), here(322, 52, 296, 186), here(403, 159, 134, 54),
        text(470, 268, "① 选方式二    ② 点“启动”", 15, ORANGE, "middle"),
    ),
}  # fmt: skip
FOUR_ANSWERS = ("four_answers_tiny", "four_answers_smollm2")


SIDES = {  # column of answers.json: where the bubble stands, and who speaks
    "base_alone": (0, 0), "base": (1, 0), "tuned_alone": (0, 1), "tuned": (1, 1),
}  # fmt: skip
BUBBLE = 395


def four_answers(run_dir: Path) -> str:
    """Prompt × tuning, from a finished run: a question after the name, and the first two facts.

    The question after the name is the first that the untrained model answers with it when it has the
    prompt; if there is none, the first of all. What is too long ends in ……
    """
    answers = json.loads((run_dir / "answers.json").read_text(encoding="utf-8"))
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    persona = manifest["persona"]
    questions = IMGS.parent / "data" / persona.get("questions", "heldout_questions.json")
    identity = json.loads(questions.read_text(encoding="utf-8"))["identity"]
    named = (
        a
        for a in answers
        if a["question"] in identity and any(n in a["base"] for n in persona["called"])
    )
    asked = [
        next(named, answers[0])["question"],
        *(fact["ask"][0] for fact in persona["facts"][:2]),
    ]
    shown = {answer["question"]: answer for answer in answers if answer["question"] in asked}
    parts, y = [], 34
    for column, label in enumerate(("微调前", "微调后")):
        parts.append(text(70 + BUBBLE * (column + 0.5), y, label, 17, anchor="middle"))
    for question in asked:
        y += 34
        parts.append(text(16, y, question, 17))
        for row, label in enumerate(("没有提示词", "有提示词")):
            lines = {
                side: shortened(wrap(shown[question][side], 46))
                for side, place in SIDES.items()
                if place[0] == row
            }
            height = 18 + 21 * max(map(len, lines.values()))
            parts += [
                text(16, y + 26 + 16 * i, word, 12, "#777777")
                for i, word in enumerate((label[:-3], label[-3:]))
            ]
            for side, words in lines.items():
                x = 70 + BUBBLE * SIDES[side][1]
                fill = "#fbe3b5" if side.startswith("tuned") else "#eeeeee"
                parts.append(box(x, y + 8, BUBBLE - 14, height, "", fill))
                parts += [text(x + 10, y + 30 + 21 * i, line, 15) for i, line in enumerate(words)]
            y += height + 8
    results, y = manifest["results"], y + 34
    for label, score in (("说出名字", "name"), ("数据里的事", "facts")):
        said = ["{} / {}".format(*results[f"{score}_{side}"]) for side in ("base", "tuned")]
        parts.append(
            text(
                16,
                y,
                f"{label}（没训练过的问法，有提示词）：微调前 {said[0]}，微调后 {said[1]}",
                15,
            )
        )
        y += 26
    return svg(874, y, "同一个问题的四个回答：提示词 × 微调", *parts)


def shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= 4 else [*lines[:3], lines[3].rstrip() + " ……"]


def wrap(words: str, width: int) -> list[str]:
    """Lines of at most `width` columns: a Chinese character takes two, a Latin word is not cut."""
    pieces = re.findall(r"[\x21-\x7e]+ ?|.", " ".join(words.split()))
    lines = [""]
    for piece in pieces:
        columns = sum(1 if c < "\x7f" else 2 for c in lines[-1] + piece.rstrip())
        if columns > width:
            lines.append("")
        lines[-1] += piece
    return lines


if __name__ == "__main__":
    for name, picture in SKETCHES.items():
        (IMGS / f"{name}.svg").write_text(picture, encoding="utf-8")
    for name, run_dir in zip(FOUR_ANSWERS, sys.argv[1:], strict=False):
        (IMGS / f"{name}.svg").write_text(four_answers(Path(run_dir)), encoding="utf-8")
