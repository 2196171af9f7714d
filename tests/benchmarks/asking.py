"""Asking: tokens a second and tokens a reply, adapter merged or not, the tutorial's call and ours.

    python tests/benchmarks/asking.py [--rounds N] [--out FILE.json]

On the run that ``make course`` left, or another in HUANHUAN_OUTPUT. All sample with the tutorial's values;
the tutorial's call also has its faults: the prompt tokenised twice, and as stop token what
``tokenizer.encode("<|eot_id|>")[0]`` gives. The ways take turns on the same questions and seeds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import conftest  # noqa: F401 - puts the helper on the path
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from huanhuan.course import DATA, Course, machine, versions
from huanhuan.prompt import DATE_STRING, chat_messages, prompt_ids

SAMPLING = {
    "do_sample": True, "top_p": 0.9, "temperature": 0.5, "repetition_penalty": 1.1,
    "max_new_tokens": 512,
}  # fmt: skip


def ours(model, tokenizer, question: str) -> int:
    """Tokens of the reply."""
    ids = torch.tensor([prompt_ids(tokenizer, question)], device=model.device)
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **SAMPLING)
    return output.shape[1] - ids.shape[1]


def tutorials(model, tokenizer, question: str) -> int:
    """Tokens of the reply."""
    text = tokenizer.apply_chat_template(
        chat_messages(question), tokenize=False, add_generation_prompt=True, date_string=DATE_STRING
    )
    ids = tokenizer([text], return_tensors="pt").to(model.device)["input_ids"]
    stop = tokenizer.encode("<|eot_id|>")[0]
    output = model.generate(ids, **SAMPLING, eos_token_id=stop)
    return output.shape[1] - ids.shape[1]


def load(course: Course):
    dtype = getattr(torch, course.profile.dtype)
    base = AutoModelForCausalLM.from_pretrained(course.path("model"), dtype=dtype)
    return PeftModel.from_pretrained(base.to(course.profile.device), course.path("adapter")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    course = Course.resume("adapter")
    tokenizer = AutoTokenizer.from_pretrained(course.path("adapter"))
    adapter, merged = load(course), load(course).merge_and_unload()
    ways = {
        "ours, merged": (ours, merged),
        "ours, adapter": (ours, adapter),
        "tutorial's call, adapter": (tutorials, adapter),
    }
    questions = json.loads((DATA / "heldout_questions.json").read_text(encoding="utf-8"))
    questions = [*questions["daily"], *questions["identity"][:4]]
    found = {name: {"seconds": [], "tokens": []} for name in ways}
    for number in range(asked.rounds + 1):
        for question in questions if number else questions[:1]:  # one question warms up
            for name, (way, model) in ways.items():
                set_seed(number)
                start = time.perf_counter()
                tokens = way(model, tokenizer, question)
                if number:
                    found[name]["seconds"].append(time.perf_counter() - start)
                    found[name]["tokens"].append(tokens)
    print(f"{'way':<26}{'tokens/s':>10}{'tokens a reply':>16}{'s a reply':>11}   (medians)")
    for name, one in found.items():
        pairs = list(zip(one.pop("tokens"), one.pop("seconds"), strict=True))
        one["tokens_a_second"] = statistics.median(tokens / seconds for tokens, seconds in pairs)
        one["tokens_a_reply"] = statistics.median(tokens for tokens, _ in pairs)
        one["seconds_a_reply"] = statistics.median(seconds for _, seconds in pairs)
        print(
            f"{name:<26}{one['tokens_a_second']:10.0f}{one['tokens_a_reply']:16.0f}"
            f"{one['seconds_a_reply']:11.2f}"
        )
    if asked.out:
        facts = {"machine": machine(), "versions": versions(), "ways": found}
        asked.out.write_text(json.dumps(facts, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
