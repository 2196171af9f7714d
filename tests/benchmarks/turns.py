"""What does training on single turns lose? The same dialogues, with and without what was said before.

The little model is trained as notebook 03 does, twice from the same start: every answer with the
turns before it, or every question and answer by itself (what a reader does that drops `history`).
Then it is asked the later questions of dialogues that neither saw ("要蒸多久呢？"), after the turns
that went before. A question counts as answered in the conversation's sense where, of four answers
that people wrote to such questions, its own and those of three other conversations, its own is the
likeliest (mean log-probability of a token): guessing gets a quarter. And the two models are compared
by how likely each finds the answer that people wrote.

    python tests/benchmarks/turns.py [--out tests/benchmarks/results/turns.json]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from huanhuan import infer, train  # noqa: E402
from huanhuan.course import PROFILES, machine, versions  # noqa: E402
from huanhuan.persona import SAMPLE  # noqa: E402
from huanhuan.preprocess import opening  # noqa: E402
from huanhuan.prompt import end_generation, end_id, prompt_ids, question_of, text_ids  # noqa: E402
from huanhuan.reader import load_rows  # noqa: E402

PROFILE = PROFILES["cpu-tiny"]
HELD_OUT, CHOICES, SHOWN = 60, 4, 12  # dialogues; answers to choose from; answers to read


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(to train on, held out): HELD_OUT dialogues of several turns, whole, are held out."""
    began = opening(rows)
    several = sorted(set(began[rows["history"].map(len) > 0]))
    draw = torch.Generator().manual_seed(0)
    chosen = {several[i] for i in torch.randperm(len(several), generator=draw)[:HELD_OUT]}
    return rows[~began.isin(chosen)], rows[began.isin(chosen)]


def tokenized(tokenizer, rows: pd.DataFrame, turns: bool) -> Dataset:
    made = []
    for row in rows.to_dict("records"):
        prompt = prompt_ids(tokenizer, question_of(row), row["history"] if turns else ())
        answer = text_ids(tokenizer, row["output"]) + [end_id(tokenizer)]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(made)


def trained(tokenizer, rows: Dataset):
    base = AutoModelForCausalLM.from_pretrained(PROFILE.model, dtype=torch.float32)
    end_generation(base, tokenizer)
    set_seed(42)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=PROFILE.lora_r, lora_alpha=PROFILE.lora_alpha,
        lora_dropout=PROFILE.lora_dropout, target_modules=train.SEVEN,
    )  # fmt: skip
    model = get_peft_model(base, lora)
    args = TrainingArguments(
        "unused", num_train_epochs=PROFILE.epochs, learning_rate=PROFILE.learning_rate,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, save_strategy="no",
        use_cpu=True, report_to="none", seed=42,
    )  # fmt: skip
    collator = train.choose_collator(model, tokenizer, rows)
    train.CourseTrainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()
    return model.eval()


@torch.no_grad()
def likelihood(model, prompt: list[int], answer: list[int]) -> float:
    """Mean log-probability of the answer's tokens after the prompt."""
    scores = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return scores.log_softmax(-1)[range(len(answer)), answer].mean().item()


def in_its_sense(model, tokenizer, asked: list[dict]) -> tuple[list[bool], list[float]]:
    """Of every question: is its own answer the likeliest, and how likely (see :func:`likelihood`)."""
    answers = [text_ids(tokenizer, row["output"]) + [end_id(tokenizer)] for row in asked]
    found, likely = [], []
    for place, row in enumerate(asked):
        others = [i % len(asked) for i in range(place, place + len(asked))]
        others = [i for i in others if asked[i]["began"] != row["began"]]
        others = [answers[i] for i in others[:: len(others) // (CHOICES - 1)][: CHOICES - 1]]
        prompt = prompt_ids(tokenizer, question_of(row), row["history"])
        mine, *rest = (likelihood(model, prompt, one) for one in (answers[place], *others))
        found.append(mine > max(rest))
        likely.append(mine)
    return found, likely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(PROFILE.model)
    rows, held = split(load_rows(SAMPLE))
    later = held.assign(began=opening(held))[held["history"].map(len) > 0].to_dict("records")
    print(f"{len(rows)} rows to train on; {len(later)} later questions of {HELD_OUT} dialogues")
    record: dict = {"questions": len(later), "shown": []}
    likely = {}
    for name, turns in (("turns", True), ("single", False)):
        model = trained(tokenizer, tokenized(tokenizer, rows, turns))
        right, likely[name] = in_its_sense(model, tokenizer, later)
        record[name] = sum(right)
        print(f"{name}: {infer.share(sum(right), len(right))}", flush=True)
        shown = later[:: len(later) // SHOWN][:SHOWN]
        histories = [row["history"] for row in shown]
        replies = infer.ask_all(
            model, tokenizer, [*map(question_of, shown)], histories=histories, max_new_tokens=80
        )
        for place, (row, reply) in enumerate(zip(shown, replies, strict=True)):
            if name == "turns":
                before = " / ".join(text for turn in row["history"] for text in turn)
                record["shown"].append({"before": before, "asked": question_of(row)})
            record["shown"][place][name] = reply.text
    pairs = zip(likely["turns"], likely["single"], strict=True)
    record["likelier"] = sum(turns > single for turns, single in pairs)
    record["loss"] = {name: -sum(said) / len(said) for name, said in likely.items()}
    print(f"likelier: {infer.share(record['likelier'], len(later))}; {record['loss']}")
    for one in record["shown"]:
        print(*(f"{name}: {text}" for name, text in one.items()), sep="\n", end="\n\n")
    if options.out:
        content = {"machine": machine(), "versions": versions()} | record
        options.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
