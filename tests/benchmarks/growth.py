"""How training grows: seconds a token and peak memory, with more rows and with longer rows.

    python tests/benchmarks/growth.py [--out FILE.json]

Ours, on the proxy of ``step.py``, 8 × 2. More rows (16, 32, 64, 128 a run) must cost time in
proportion, and no memory; longer rows (64 … 384 tokens, of which the first 47 are shared) cost
memory. Every case runs in a process of its own, so that its peak is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import step
import torch
from transformers import TrainingArguments

from huanhuan.course import machine, peak_memory_gib, versions
from huanhuan.train import ROWS, CourseTrainer, SharedPrefixCollator

PREFIX = 47  # tokens that all rows of the course begin with
CASES = [(rows, 128) for rows in (16, 32, 64, 128)] + [(32, length) for length in (64, 256, 384)]


def case(rows: int, length: int) -> dict:
    """Train on `rows` rows of `length` tokens, after one step that warms up."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(PREFIX, step.VOCAB, (rows, length), generator=draw)
    tokens[:, :PREFIX] = torch.arange(PREFIX)
    unlabelled = PREFIX + (length - PREFIX) // 2
    data = [
        {"input_ids": ids, "labels": [-100] * unlabelled + ids[unlabelled:]}
        for ids in tokens.tolist()
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True,
            gradient_accumulation_steps=2, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        model = step.proxy()
        model.set_attn_implementation(ROWS)
        for chosen in (data[:16], data):
            trainer = CourseTrainer(
                model=model, args=arguments, train_dataset=chosen,
                data_collator=SharedPrefixCollator(dense=False),
            )  # fmt: skip
            start = time.perf_counter()
            trainer.train()
    seconds = time.perf_counter() - start
    return {
        "rows": rows, "tokens_a_row": length, "seconds": seconds,
        "microseconds_a_token": seconds / (rows * length) * 1e6,
        "peak_memory_gib": peak_memory_gib(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.case:
        print("\n" + json.dumps(case(*asked.case)))
        return
    found = []
    print(f"{'rows':>6}{'tokens a row':>14}{'s':>8}{'µs a token':>12}{'peak GiB':>10}")
    for rows, length in CASES:
        command = [sys.executable, __file__, "--case", str(rows), str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        one = json.loads(done.stdout.splitlines()[-1])
        found.append(one)
        print(
            f"{rows:6}{length:14}{one['seconds']:8.2f}{one['microseconds_a_token']:12.0f}"
            f"{one['peak_memory_gib']:10.2f}",
            flush=True,
        )
    if asked.out:
        facts = {"machine": machine(), "versions": versions(), "cases": found}
        asked.out.write_text(json.dumps(facts, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
