"""Which rate, and how many steps, teach a small real model what only the data tells?

SmolLM2-135M-Instruct (real weights, from the package index) and the English persona. Every recipe
trains from the same start as notebook 03 does, without dropout's luck in the split: 16 rows a step,
all rows of the sample but the validation tenth. Asked are the held-out ways of the persona's facts,
with the persona's prompt, greedily; and ordinary questions without it.

    python tests/benchmarks/rates.py MODEL_FOLDER [--out tests/benchmarks/results/rates.json]

Writes one record a recipe, the untrained base first, and the Markdown table for notebook 03.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HUANHUAN_PERSONA", str(ROOT / "data" / "persona_english.json"))
sys.path.insert(0, str(ROOT / "notebooks"))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from report import rates_table  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from huanhuan import infer, train  # noqa: E402
from huanhuan.course import machine, versions  # noqa: E402
from huanhuan.persona import QUESTIONS, SAMPLE  # noqa: E402
from huanhuan.preprocess import split_by_instruction  # noqa: E402
from huanhuan.prompt import end_generation, end_id, prompt_ids, question_of, text_ids  # noqa: E402
from huanhuan.reader import load_rows  # noqa: E402

RECIPES = [(1e-4, 4), (5e-4, 4), (5e-4, 8), (1e-3, 4)]  # (rate, epochs)


def tokenized(tokenizer, texts) -> Dataset:
    """`texts` (what load_rows returns) as notebook 02 makes them."""

    def row(example):
        prompt = prompt_ids(tokenizer, question_of(example), example["history"])
        answer = text_ids(tokenizer, example["output"]) + [end_id(tokenizer)]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    return Dataset.from_list([row(example) for example in texts.to_dict("records")])


def measure(model, tokenizer) -> dict:
    """Right answers of all asked: facts in held-out ways, ordinary questions without the prompt."""
    facts, general = infer.fact_questions(), QUESTIONS["general"]
    told = infer.four_answers(model, tokenizer, list(facts), ["tuned"], max_new_tokens=60)
    plain = infer.four_answers(model, tokenizer, list(general), ["tuned_alone"], max_new_tokens=60)
    return {
        "facts": infer.tally(told, lambda q, a: infer.says(a, facts[q]))["tuned"],
        "general": infer.tally(plain, lambda q, a: infer.says(a, *general[q]))["tuned_alone"],
    }


def trained(folder, tokenizer, parts, rate: float, epochs: int, rank: int = 8, micro: int = 8):
    """The model in `folder` after a training as notebook 03's; and steps, seconds, held-out loss.

    `parts` are (train, eval); no epochs: as it was.
    """
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end_generation(base, tokenizer)
    set_seed(42)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=4 * rank, lora_dropout=0.1,
        target_modules=train.lora_targets(base, train.SEVEN),
    )  # fmt: skip
    model = get_peft_model(base, lora)
    args = TrainingArguments(
        "unused", num_train_epochs=max(epochs, 1), learning_rate=rate, save_strategy="no",
        per_device_train_batch_size=micro, gradient_accumulation_steps=16 // micro, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=10, seed=42,
    )  # fmt: skip
    trainer = train.CourseTrainer(
        model=model, args=args, train_dataset=parts[0], eval_dataset=parts[1],
        data_collator=train.choose_collator(model, tokenizer, parts[0]),
    )  # fmt: skip
    began = time.time()
    if epochs:
        trainer.train()
    took = {"steps": trainer.state.global_step, "seconds": round(time.time() - began)}
    return model.eval(), took | {"loss": trainer.evaluate()["eval_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    parts = split_by_instruction(load_rows(SAMPLE), eval_fraction=0.1, seed=42)
    parts = [tokenized(tokenizer, part) for part in parts]
    records = []
    for rate, epochs in [(0.0, 0), *RECIPES]:
        model, took = trained(options.model, tokenizer, parts, rate, epochs)
        records.append({"rate": rate, "epochs": epochs} | took | measure(model, tokenizer))
        print(records[-1], flush=True)
    print(rates_table(records))
    if options.out:
        content = {"machine": machine(), "versions": versions(), "records": records}
        options.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
