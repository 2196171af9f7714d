import json
import shutil

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
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


# Of the course's tokenizer, which pads the batches.
VOCABULARY = LlamaConfig.from_pretrained(ROOT / "data" / "tiny_llama").vocab_size


def random_llama(attention="sdpa", tied=True):
    """Two layers of Llama with random weights, three heads to a key-value head, in float32."""
    set_seed(42)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def row(prompt, answer):
    """A row as notebook 02 makes it: `answer` carries labels."""
    ids = list(prompt) + list(answer)
    labels = [-100] * len(prompt) + list(answer)
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def dialogues(count, seed=0):
    """`count` rows of 10 + 1…12 + 1…8 random tokens; the first ten are the same in all."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(most):
        length = torch.randint(1, most + 1, (), generator=draw)
        return torch.randint(20, 90, (length,), generator=draw).tolist()

    return [row([*range(10), *tokens(12)], tokens(8)) for _ in range(count)]


def loss_and_gradients(model, batch, items):
    """The loss, summed over labels and divided by `items`, and the gradient of every weight."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=items).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_to_padded(model, rows, pad, noise=1e-7):
    """Loss to 1e-6, gradients to 1e-5; what counts as a label is counted alike.

    A gradient that is zero by arithmetic (of a query that sees equal keys) is `noise` in both.
    """
    ours = train.SharedPrefixCollator()(rows)
    items = max(int((pad["labels"][:, 1:] != -100).sum()), 1)
    assert (ours["labels"] != -100).sum() == (pad["labels"] != -100).sum()
    assert (ours["shift_labels"] != -100).sum() == (pad["labels"][:, 1:] != -100).sum()
    loss, gradients = loss_and_gradients(model, pad, items)
    our_loss, our_gradients = loss_and_gradients(model, ours, items)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    noise *= max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + noise, name


P = [1, 2, 3, 4, 5, 6]
MICRO_BATCHES = {
    "one system prompt": dialogues(8),
    "two system prompts": [
        row([*P, 7, 8, 20], [30, 2]), row([*P, 9, 10, 11, 21], [31, 2]),
        row([*P, 7, 8, 22], [32, 2]), row([*P, 9, 10, 11, 23, 24], [33, 2]),
    ],
    "nothing in common": [row([10, 11], [12, 13]), row([20, 21, 22], [23]), row([30], [31, 32])],
    "one row the beginning of another": [row(P, [7, 8]), row([*P, 7, 8, 9], [10])],
    "labels where another row has its prompt": [row(P[:2], P[2:]), row(P, [7, 8])],
    "the same row twice": [row(P, [7, 8]), row(P, [7, 8])],
    "the same prompt, two answers": [row(P, [7, 8]), row(P, [9, 8])],
    "a single row": [row(P, [7, 8])],
    "a prompt of one token": [row([1], [7, 8]), row([1], [9])],
    "a row without labels": [row(P, []), row(P, [7])],
    "no labels at all": [row(P, []), row(P, []), row(P[:3], [])],
    "labels from the first token on": [row([], [5, 6, 7]), row([], [5, 8])],
    "labels in two places": [
        {"input_ids": [*P, 7, 8, 9], "labels": [-100, -100, 3, 4, -100, -100, 7, -100, 9]},
        {"input_ids": [*P, 7, 9], "labels": [-100, -100, 3, -100, -100, -100, 7, 9]},
    ],
}  # fmt: skip


def padded(tokenizer, rows):
    """The batch of DataCollatorForSeq2Seq, which wants an attention mask in every row."""
    rows = [{"attention_mask": [1] * len(row["input_ids"])} | row for row in rows]
    return dict(DataCollatorForSeq2Seq(tokenizer)(rows))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_shared_prefix_gives_loss_and_gradient_of_the_padded_batch(
    tokenizer, rows, tied, attention
):
    assert_equal_to_padded(random_llama(attention, tied), rows, padded(tokenizer, rows))


any_row = st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=7)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=st.lists(any_row, min_size=1, max_size=6))
def test_shared_prefix_holds_for_any_rows(tokenizer, drawn):
    """Three different tokens only, so that rows often begin alike; labels anywhere."""
    rows = [
        {"input_ids": [t for t, _ in row], "labels": [t if taught else -100 for t, taught in row]}
        for row in drawn
    ]
    assert_equal_to_padded(random_llama(), rows, padded(tokenizer, rows), noise=1e-6)


def test_shared_prefix_stands_once():
    rows = MICRO_BATCHES["two system prompts"]
    batch = train.SharedPrefixCollator()(rows)
    assert batch["input_ids"].tolist() == [
        [*P, 7, 8, 20, 30, 2, 22, 32, 2, 9, 10, 11, 21, 31, 2, 23, 24, 33, 2]
    ]
    assert batch["position_ids"].tolist() == [[*range(11), 8, 9, 10, *range(6, 12), *range(9, 13)]]
    sees = (batch["attention_mask"][0, 0] == 0).int()
    assert sees[12].nonzero().flatten().tolist() == [*range(8), 11, 12]  # 32: P 7 8, 22, itself
    assert sees[-1].nonzero().flatten().tolist() == [*range(6), 14, 15, 16, *range(20, 24)]
    assert (
        sees.sum(1) == batch["position_ids"] + 1
    ).all()  # as many as stand before it, and itself
    assert batch["logits_to_keep"].tolist() == [8, 9, 11, 12, 17, 18, 21, 22]
    assert batch["shift_labels"].tolist() == [[30, 2, 32, 2, 31, 2, 33, 2]]


def lora_losses(folder, collator, micro, accumulation, checkpointing=False):
    """The losses of 5 steps of 8 rows, and of an evaluation whose last batch is not full."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(random_llama(), config)
    model.enable_input_require_grads()
    args = TrainingArguments(
        folder, max_steps=5, per_device_train_batch_size=micro, per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulation, gradient_checkpointing=checkpointing,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, prediction_loss_only=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, data_collator=collator,
        train_dataset=dialogues(8), eval_dataset=dialogues(9, seed=1),
    )  # fmt: skip
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*steps, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize(
    "micro, accumulation, checkpointing",
    [(8, 1, False), (4, 2, True), (2, 4, False), (1, 8, False)],
)
def test_shared_prefix_trains_as_padding_does(
    tokenizer, tmp_path, micro, accumulation, checkpointing
):
    expected = lora_losses(tmp_path, DataCollatorForSeq2Seq(tokenizer), 4, 2)
    losses = lora_losses(tmp_path, train.SharedPrefixCollator(), micro, accumulation, checkpointing)
    assert len(losses) == 6 and losses[4] < losses[0] - 0.1
    assert losses == pytest.approx(expected, abs=1.01e-4)  # transformers 4 logs four decimals


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mask_of_the_models_own_dtype_does_as_well(attention):
    rows, model = MICRO_BATCHES["two system prompts"], random_llama(attention).to(torch.bfloat16)
    losses = [
        model(**train.SharedPrefixCollator(dtype)(rows)).loss.item()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
