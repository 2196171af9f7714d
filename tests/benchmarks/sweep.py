"""What to change when the result is poor: one setting after the other, on the little model.

Every recipe is notebook 03's for the little model but for one thing: the rate, the rank, the epochs,
the rows, or how many ordinary dialogues (without her prompt, in the assistant's own voice) are mixed
in. Asked are: who she is and what only her data tells, in held-out ways, with her prompt; and ordinary
questions without it.

    python tests/benchmarks/sweep.py [--out tests/benchmarks/results/sweep.json]

Writes one record a recipe, the untrained base first; notebook 04 shows them, and can run this.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ["HUANHUAN_PERSONA"] = str(ROOT / "data" / "persona_huanhuan.json")
sys.path.insert(0, str(ROOT / "data"))

from datasets import Dataset, concatenate_datasets  # noqa: E402
from make_dialogues import ASSISTANT, dialogues  # noqa: E402
from rates import measure, tokenized, trained  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from huanhuan import infer  # noqa: E402
from huanhuan.course import PROFILES, machine, versions  # noqa: E402
from huanhuan.persona import QUESTIONS, SAMPLE  # noqa: E402
from huanhuan.preprocess import split_by_instruction  # noqa: E402
from huanhuan.prompt import end_id, prompt_ids, text_ids  # noqa: E402
from huanhuan.reader import load_rows  # noqa: E402

USUAL = {"rate": 1.2e-3, "epochs": 2, "rank": 8, "rows": None, "ordinary": 0.0}
FORGETFUL = 1.5e-2  # a rate at which she learns all and forgets much
RECIPES = [
    {}, {"rate": 1e-4}, {"rate": 2e-2}, {"epochs": 1}, {"epochs": 4}, {"rank": 1}, {"rank": 32},
    {"rows": 400}, {"rows": 100}, {"rows": 100, "epochs": 20}, {"rows": 100, "epochs": 60},
    {"rate": FORGETFUL}, *({"rate": FORGETFUL, "ordinary": share} for share in (0.1, 0.2, 0.5)),
]  # fmt: skip


def ordinary_rows(tokenizer, count: int) -> Dataset:
    """So many dialogues of the assistant's, asked without any prompt of hers."""
    plain = (one for one in dialogues(seed=7) if one["system"] in ASSISTANT)
    rows = []
    for one in itertools.islice(plain, count):
        *before, (question, answer) = one["turns"]
        prompt = prompt_ids(tokenizer, question, before, system=None)
        reply = text_ids(tokenizer, answer) + [end_id(tokenizer)]
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return Dataset.from_list(rows)


def names_said(model, tokenizer) -> tuple[int, int]:
    asked = infer.four_answers(
        model, tokenizer, QUESTIONS["identity"], ["tuned"], max_new_tokens=60
    )
    return infer.tally(asked, lambda _, answer: infer.in_persona(answer))["tuned"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = PROFILES["cpu-tiny"].model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, held = split_by_instruction(load_rows(SAMPLE), eval_fraction=0.1, seed=42)
    held, records = tokenized(tokenizer, held), []
    for change in [{"epochs": 0}, *RECIPES]:
        recipe = USUAL | change
        rows = tokenized(tokenizer, texts.sample(frac=1, random_state=1).head(recipe["rows"]))
        if share := recipe["ordinary"]:
            count = round(len(rows) * share / (1 - share))
            rows = concatenate_datasets([rows, ordinary_rows(tokenizer, count)])
        model, took = trained(
            folder, tokenizer, (rows, held), recipe["rate"], recipe["epochs"], recipe["rank"], 16
        )
        said = {"name": names_said(model, tokenizer)} | measure(model, tokenizer)
        records.append({"change": change} | recipe | took | said)
        print("…", len(records), "/", len(RECIPES) + 1, records[-1], flush=True)
    if options.out:
        content = {"machine": machine(), "versions": versions(), "records": records}
        options.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
