"""Reading is the test: base and tuned answers, blind, on one sheet; and the table of two readers.

    python tests/reading/reading.py ask [RUN]    answers of base and tuned model to questions.json
    python tests/reading/reading.py sheet        the blind sheet, base and tuned shuffled together
    python tests/reading/reading.py table        from ratings/*.json into README.md

RUN is a run directory that has been through notebook 03 (default: notebooks/output/cpu-tiny). Both
are asked with the persona's prompt, greedily. A reader who has seen neither the data nor the key
gives every numbered answer of the sheet 2, 1 or 0 after the rubric in README.md, and writes
``{"reader": who or what, "date": "YYYY-MM-DD", "ratings": {"1": 2, …}}`` to a file in ratings/.
"""

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIDES = {"base": "before the training", "tuned": "after it"}
BEGIN, END = "<!-- table -->", "<!-- /table -->"


def read(name: str):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def ask(run: Path) -> None:
    """Write answers.json: a list of {"group", "question", "base", "tuned"}."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from huanhuan.infer import four_answers
    from huanhuan.prompt import end_generation

    files = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["files"]
    folder = Path(files["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    end_generation(base, tokenizer)
    model = PeftModel.from_pretrained(base, run / files["adapter"]).eval()
    asked = [(group, text) for group, texts in read("questions.json").items() for text in texts]
    answers = four_answers(model, tokenizer, [text for _, text in asked], ["base", "tuned"])
    rows = [
        {"group": group, "question": row.question, "base": row.base, "tuned": row.tuned}
        for (group, _), row in zip(asked, answers.itertuples(), strict=True)
    ]
    write(HERE / "answers.json", "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n")  # fmt: skip
    ended = int(answers["base_stopped"].sum()), int(answers["tuned_stopped"].sum())
    print(f"{len(rows)} questions; ended by itself: base {ended[0]}, tuned {ended[1]}")


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def numbered() -> list[tuple[dict, str]]:
    """Every answer as (row, side), in the order of the blind sheet."""
    pairs = [(row, side) for row in read("answers.json") for side in SIDES]
    random.Random(2026).shuffle(pairs)
    return pairs


def sheet() -> str:
    lines = [f"{n}. 问：{row['question']}\n   答：{row[side]}" for n, (row, side) in enumerate(numbered(), 1)]  # fmt: skip
    return "\n".join(lines) + "\n"


def kappa(one: list[int], two: list[int]) -> float:
    """Cohen's kappa with quadratic weights: 1 is full agreement, 0 what chance would give."""
    n, levels = len(one), (0, 1, 2)
    seen = sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) / n
    chance = sum(one.count(a) * two.count(b) * (a - b) ** 2 for a in levels for b in levels) / n**2
    return 1 - seen / chance if chance else 1.0


def table() -> str:
    """The Markdown table: mean rating and zeros of either side, a group and a reader."""
    readers = [json.loads(f.read_text(encoding="utf-8")) for f in sorted((HERE / "ratings").glob("*.json"))]  # fmt: skip
    pairs = numbered()
    lines = [
        "| questions | reader | before: mean, zeros | after: mean, zeros |",
        "|---|---|---|---|",
    ]
    for group in read("questions.json"):
        for reader in readers:
            cells = []
            for side in SIDES:
                given = [
                    reader["ratings"][str(n)]
                    for n, (row, whose) in enumerate(pairs, 1)
                    if (row["group"], whose) == (group, side)
                ]
                cells.append(f"{sum(given) / len(given):.2f}, {given.count(0)} / {len(given)}")
            lines.append(f"| {group} | {reader['reader']}, {reader['date']} | {' | '.join(cells)} |")  # fmt: skip
    one, two = ([reader["ratings"][str(n)] for n in range(1, len(pairs) + 1)] for reader in readers)
    same = sum(a == b for a, b in zip(one, two, strict=True))
    lines += ["", f"The two agree on {same} of {len(pairs)} answers; quadratic kappa {kappa(one, two):.2f}."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ask", "sheet", "table"])
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "notebooks/output/cpu-tiny")
    args = parser.parse_args()
    if args.what == "ask":
        ask(args.run.resolve())
    elif args.what == "sheet":
        print(sheet(), end="")
    else:
        page = HERE / "README.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        write(page, f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
        print(table())


if __name__ == "__main__":
    main()
