"""Draw the course's pictures: ``python imgs/draw.py [run directory] [run directory]``.

Without an argument the sketches of the platform's pages, one a UI step of the course; with the
directories of a finished ``make course`` and ``make course-real`` also their four answers for the
README, ``four_answers_tiny.svg`` and ``four_answers_smollm2.svg``.
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


def lab(title: str, *parts: str, files: tuple[str, ...] = ()) -> str:
    """A sketch of JupyterLab: files at the left, the toolbar and the page at the right."""
    names = [text(34, 92 + 26 * i, name, 13) for i, name in enumerate(files)]
    return svg(
        640, 260, title,
        box(0, 0, 640, 34, "JupyterLab", "#eeeeee"), box(12, 44, 180, 204), text(22, 66, "文件", 13, "#777777"), *names,
        box(202, 44, 426, 204, "", PAPER), *parts,
    )  # fmt: skip


BOOKS = ("01_setup.ipynb", "02_preprocess.ipynb", "03_train_lora.ipynb")

SKETCHES = {
    "ui_1_1_gpu_environment": svg(
        640, 260, "魔搭的“我的 Notebook”页面：选择方式二，GPU 环境",
        box(0, 0, 640, 34, "我的 Notebook", "#eeeeee"),
        box(30, 60, 270, 150, "方式一：CPU 环境"), box(330, 60, 270, 150, ""), text(465, 105, "方式二：GPU 环境", 16, anchor="middle"),
        box(405, 145, 120, 36, "启动", BLUE, PAPER), here(322, 52, 286, 166), text(465, 242, "① 选它，再点“启动”", 14, ORANGE, "middle"),
    ),
    "ui_1_2_create_notebook": lab(
        "JupyterLab 启动页：点 Notebook 下面的 Python 3",
        text(222, 78, "Notebook", 16), box(222, 92, 110, 90, "Python 3"), text(222, 222, "Console", 16, "#777777"),
        here(214, 84, 126, 106), text(352, 142, "← 新建一本笔记本", 14, ORANGE), files=("huanhuan-course",),
    ),
    "ui_1_3_rename": lab(
        "在左侧文件上点右键，选择 Rename",
        box(120, 100, 150, 30, "Open"), box(120, 130, 150, 30, "Rename"), box(120, 160, 150, 30, "Duplicate"),
        here(114, 127, 162, 36), text(290, 150, "← 右键菜单里的“重命名”", 14, ORANGE), files=BOOKS,
    ),
    "ui_1_3_add_cell": lab(
        "工具栏第二个按钮，加号，在下面添加一个单元格",
        *(box(212 + 40 * i, 52, 34, 28, sign) for i, sign in enumerate(("存", "＋", "剪", "贴", "▶"))),
        here(247, 47, 44, 38), text(300, 104, "↖ 添加单元格；▶ 运行", 14, ORANGE), box(222, 120, 386, 40, "[ ]:  在这里写代码"), files=BOOKS,
    ),
    "ui_1_4_upload_dataset": lab(
        "笔记本里的上传按钮：选择数据集文件",
        box(222, 70, 150, 36, "⬆ 选择数据集 (1)"), here(215, 63, 164, 50), text(392, 94, "← 点它，选 .json 文件", 14, ORANGE),
        text(222, 140, "✅ 收到 我的对话.json，共 20 条对话。", 14), files=BOOKS,
    ),
    "ui_1_4_3_result": lab(
        "训练完成后，运行目录里出现 llama3_lora",
        here(24, 121, 156, 32), text(222, 90, "训练完成：损失曲线往下走", 14),
        f'<polyline points="222,120 250,165 290,190 350,207 430,216 600,222" fill="none" stroke="{BLUE}" stroke-width="3"/>',
        files=("checkpoints", "executed", "llama3_lora", "tokenized", "manifest.json"),
    ),
    "ui_2_download_adapter": lab(
        "在 llama3_lora.zip 上点右键，选择 Download",
        box(150, 130, 150, 30, "Download"), here(144, 127, 162, 36), text(320, 150, "← 存到自己的电脑上", 14, ORANGE),
        files=("answers.json", "llama3_lora", "llama3_lora.zip"),
    ),
}  # fmt: skip


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
    for name, run_dir in zip(("tiny", "smollm2"), sys.argv[1:], strict=False):
        picture = four_answers(Path(run_dir))
        (IMGS / f"four_answers_{name}.svg").write_text(picture, encoding="utf-8")
