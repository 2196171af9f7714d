"""Turn ``results/*.json`` into the README's tables and imgs/bench_step.svg.

python tests/benchmarks/report.py
"""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import matplotlib
import matplotlib.pyplot as plt
from conftest import ROOT

from huanhuan.show import BLUE, GREY, ORANGE, STYLE, Figure

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- bench: make bench 写到这里 -->", "<!-- bench: 到此为止 -->"

# What the README shows of the step: everybody's best split.
FAMILIES = {
    "tutorial": "教程：补齐 + 梯度检查点",
    "no checkpointing": "教程，不用检查点",
    "LLaMA-Factory": "LLaMA-Factory，最好的一种",
    "TRL padded": "TRL，补齐",
    "TRL padding-free": "TRL，padding-free",
    "ours": "本课程：合并开头",
}


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def best_of_each(recipes: dict) -> list[tuple[str, str, dict]]:
    """(label, split, result) of the fastest split of every family."""
    rows = []
    for family, label in FAMILIES.items():
        mine = {name: one for name, one in recipes.items() if name.rsplit(" ", 1)[0] == family}
        if mine:
            name = min(mine, key=lambda name: mine[name]["median_seconds"])
            rows.append((label, name.rsplit(" ", 1)[1].replace("x", " × "), mine[name]))
    return rows


def rates_table(records: list[dict]) -> str:
    """The records of rates.json as the Markdown table that stands in notebook 03."""
    from huanhuan.infer import share

    lines = [
        "| 学习率 | 轮数（步数） | 验证集损失 | 数据里的事，答对 | 普通问题，答对 |",
        "|---|---|---|---|---|",
    ]
    for one in records:
        recipe = f"{one['rate']:.0e} | {one['epochs']}（{one['steps']}）".replace("e-0", "e-")
        if not one["steps"]:
            recipe = "没有训练 | 0"
        told, plain = (share(*one[name]) for name in ("facts", "general"))
        lines.append(f"| {recipe} | {one['loss']:.2f} | {told} | {plain} |")
    return "\n".join(lines)


def step_table(step: dict, first: str) -> list[str]:
    """A result of step.py as the lines of a Markdown table; `first` heads its first column."""
    lines = [f"| {first} | 批次划分 | 秒（中位数） | 速度（第一行是 1） |", "|---|---|---|---|"]
    for label, split, one in best_of_each(step["recipes"]):
        seconds, times = one["median_seconds"], one["times_faster"]
        lines.append(f"| {label} | {split} | {seconds:.1f} | {times:.2f} × |")
    rounds = len(next(iter(step["recipes"].values()))["seconds"])
    lines += [
        "",
        f"各种做法轮流走同样的 {rounds} 步；每一步的损失最多相差 {step['largest_loss_difference']:.0e}。"
        f"这台机器的矩阵乘法每秒 {step['matmul_tflops'] * 1000:.0f} GFLOP。",
        "",
    ]
    return lines


def tables() -> str:
    """Markdown for the README."""
    wide, narrow, growth, asking = map(results, ("step_wide", "step", "growth", "asking"))
    lines = step_table(wide, "一步 16 条对话")
    if (RESULTS / "step_turns.json").exists():
        lines += step_table(results("step_turns"), "一步 4 段对话，每段 4 个回答、约 600 个词元")
    ours = [best_of_each(one["recipes"])[-1][2]["times_faster"] for one in (narrow, wide)]
    lines += [
        f"换成只有十二分之一宽的模型（28 层，几分钟量完，随课程附带的对话），本课程是教程的 {ours[0]:.2f} 倍："
        "越窄，矩阵乘法以外的开销占得越多，所以只作对照。",
        "",
    ]
    lines += ["| 训练多少条 | 每条多少词元 | 每个词元，微秒 | 内存峰值 GiB |", "|---|---|---|---|"]
    for case in growth["cases"]:
        lines.append(
            f"| {case['rows']} | {case['tokens_a_row']} | {case['microseconds_a_token']:.0f} "
            f"| {case['peak_memory_gib']:.2f} |"
        )
    lines += ["", "| 提问 | 词元 / 秒 | 一条回答的词元 | 一条回答的秒数 |", "|---|---|---|---|"]
    labels = {
        "ours, merged": "适配器已合并",
        "ours, adapter": "适配器未合并",
        "tutorial's call, adapter": "教程的写法，未合并",
    }
    for name, one in asking["ways"].items():
        lines.append(
            f"| {labels[name]} | {one['tokens_a_second']:.0f} | {one['tokens_a_reply']:.0f} "
            f"| {one['seconds_a_reply']:.2f} |"
        )
    versions = "，".join(f"{k} {v}" for k, v in wide["versions"].items())
    lines += ["", f"测量环境：{wide['machine']}；{versions}。"]
    return "\n".join(lines)


def picture() -> str:
    """The step's table as SVG."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the browser has fonts
    rows = best_of_each(results("step_wide")["recipes"])
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots()
        names = [f"{label}（{split}）" for label, split, _ in rows]
        seconds = [one["median_seconds"] for _, _, one in rows]
        colours = [ORANGE, *[GREY] * (len(rows) - 2), BLUE]
        bars = axes.barh(names, seconds, color=colours)
        axes.bar_label(bars, [f"{s:.2f} 秒" for s in seconds], padding=4)
        axes.set(xlabel="一步 16 条对话的秒数，越短越好", xlim=(0, max(seconds) * 1.15))
        axes.invert_yaxis()
    return Figure(figure, "几种训练做法一步所用的时间").svg


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n{tables()}\n{END}{after}", encoding="utf-8")
    (ROOT / "imgs" / "bench_step.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
