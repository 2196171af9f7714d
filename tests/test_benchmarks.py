"""The benchmarks that need another machine still start on this one; the README quotes the measured."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "benchmarks"))


@pytest.mark.newest
def test_the_gpu_benchmark_runs_small_on_a_cpu(tmp_path):
    out = tmp_path / "cuda.json"
    command = [
        sys.executable,
        ROOT / "tests" / "benchmarks" / "whole_training.py",
        "--hidden",
        "256",
    ]
    command += [
        "--layers",
        "2",
        "--steps",
        "2",
        "--out",
        out,
        "--only",
        "tutorial",
        "padded",
        "ours",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(out.read_text(encoding="utf-8"))
    assert set(facts["recipes"]) == {
        "tutorial 4x4", "padded 4x4", "ours 4x4", "ours 8x2", "ours 16x1"
    }  # fmt: skip
    expected = facts["recipes"]["tutorial 4x4"]["losses"]
    assert len(expected) == 2
    for name, one in facts["recipes"].items():
        assert one["losses"] == pytest.approx(expected, abs=1e-4), name


def test_a_batch_filled_up_for_the_compiler_gives_the_same_loss():
    import torch
    import whole_training
    from test_train import dialogues, random_llama

    from huanhuan.train import SharedPrefixCollator

    rows, model = dialogues(5), random_llama()
    filled = whole_training.bucketed(rows)
    assert filled["input_ids"].shape[1] % 128 == 0
    filled["attention_mask"] = filled["attention_mask"].float()
    with torch.no_grad():
        packed = SharedPrefixCollator()(rows)
        losses = [model(**batch).loss.item() for batch in (packed, filled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_readme_quotes_what_was_measured():
    import report

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.tables() in text
    losses = report.results("step")
    assert losses["largest_loss_difference"] < 5e-5


def test_notebook_03_shows_the_rates_that_were_measured():
    """A rate too small teaches nothing; one that fits teaches what only the data tells."""
    import report

    records = report.results("rates")["records"]
    book = json.loads((ROOT / "notebooks" / "03_train_lora.ipynb").read_text(encoding="utf-8"))
    assert any(report.rates_table(records) in "".join(cell["source"]) for cell in book["cells"])
    best = max(records, key=lambda one: one["facts"][0])
    assert records[0]["facts"][0] == records[1]["facts"][0] == 0 and records[1]["rate"] == 1e-4
    assert best["facts"][0] >= 0.85 * best["facts"][1]
