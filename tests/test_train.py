import json
import shutil

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from huanhuan import train
from huanhuan.course import Course


def small_trainer(tokenizer, folder, steps=4):
    """A Trainer on the tiny model, with dropout, that writes a checkpoint a step."""
    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny_llama", dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], lora_dropout=0.1),
    )
    rows = [
        {"input_ids": [1, 2, 3, 4 + i], "attention_mask": [1] * 4, "labels": [-100, -100, 3, 4 + i]}
        for i in range(16)
    ]
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
        learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(
        model=model, args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
    )


def weights(trainer):
    return {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }


def test_estimate_changes_nothing(tokenizer, tmp_path):
    plain, estimated = (
        small_trainer(tokenizer, tmp_path / "a"),
        small_trainer(tokenizer, tmp_path / "b"),
    )
    plain.train()
    set_seed(42)
    assert train.estimate_minutes(estimated) > 0
    assert all(p.grad is None for p in estimated.model.parameters())
    estimated = small_trainer(tokenizer, tmp_path / "b")
    train.estimate_minutes(estimated)
    estimated.train()
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(plain).values(), weights(estimated).values(), strict=True)
    )


@pytest.fixture
def interrupted(tokenizer, run_dir):
    """A course whose training of 4 steps stopped after the third; and its recipe."""
    course, recipe = Course.start(), {"rate": 1e-2}
    assert train.resume_point(course, recipe) is None
    trainer = small_trainer(tokenizer, run_dir / "checkpoints")
    trainer.train()
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint-4")
    return course, recipe, trainer


def test_resumed_training_ends_where_the_uninterrupted_one_did(tokenizer, run_dir, interrupted):
    course, recipe, whole = interrupted
    point = train.resume_point(course, recipe)
    assert point.name == "checkpoint-3"
    again = small_trainer(tokenizer, run_dir / "checkpoints")
    again.train(resume_from_checkpoint=str(point))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], tensor)


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_checkpoint_cut_off_while_written_is_passed_over(run_dir, interrupted, file):
    course, recipe, _ = interrupted
    damaged = run_dir / "checkpoints" / "checkpoint-3" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert train.resume_point(course, recipe).name == "checkpoint-2"


def test_other_recipe_starts_afresh_and_keeps_the_old_checkpoints(run_dir, interrupted):
    course, recipe, _ = interrupted
    assert train.resume_point(course, recipe | {"rate": 1}) is None
    assert not list((run_dir / "checkpoints").glob("checkpoint-*"))
    assert list(run_dir.glob("checkpoints-*/checkpoint-3"))


def test_finished_training_is_not_resumed(tokenizer, run_dir):
    course = Course.start()
    train.resume_point(course, {})
    small_trainer(tokenizer, run_dir / "checkpoints", steps=1).train()
    assert train.resume_point(course, {}) is None


def test_saved_adapter_names_no_path_of_this_machine(finished_run):
    folder = finished_run.path("adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny_llama"
    for file in folder.glob("*.json"):
        assert str(ROOT) not in file.read_text(encoding="utf-8")
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
