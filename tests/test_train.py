import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
from conftest import NOTEBOOKS, ROOT, run_course
from datasets import Dataset
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
from huanhuan.course import PROFILES, Course, CourseError, Profile


def small_trainer(tokenizer, folder, steps=4):
    """A trainer on the tiny model, with dropout, that writes a checkpoint a step."""
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
        save_total_limit=3,
        learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return train.CourseTrainer(
        model=model, args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
    )


def weights(trainer):
    return {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }


def test_timing_the_splits_changes_nothing(tokenizer, tmp_path, run_dir, capsys):
    plain = small_trainer(tokenizer, tmp_path / "a")
    plain.train()
    timed, rows = small_trainer(tokenizer, tmp_path / "b"), Dataset.from_list(dialogues(40))
    random_state = torch.get_rng_state()
    candidates = [train.Split(8), train.Split(4)]
    split = train.choose_split(Course.start(), {}, timed.model, rows, candidates)
    assert split.micro_batch in (4, 8) and split.seconds > 0
    assert capsys.readouterr().out.count("一步约") == 2
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in timed.model.parameters())
    timed.train()
    for name, tensor in weights(plain).items():
        assert torch.equal(weights(timed)[name], tensor)


def test_a_trial_adapter_is_thrown_away_even_when_stopped(tokenizer, tmp_path):
    model = small_trainer(tokenizer, tmp_path).model
    lora = model.peft_config["default"]
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), train.trial_adapter(model, lora):
            assert all("trial" in n for n, p in model.named_parameters() if p.requires_grad)
            raise KeyboardInterrupt
    assert [*model.peft_config] == ["default"] == model.active_adapters
    assert learning == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.fixture
def interrupted(tokenizer, run_dir):
    """A course whose training of 4 steps stopped after the third; and its recipe."""
    course, recipe = Course.start(), {"rate": 1e-2}
    assert train.resume_point(course, recipe, train.Split(4)) is None
    trainer = small_trainer(tokenizer, run_dir / "checkpoints")
    trainer.train()
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint-4")
    return course, recipe, trainer


def test_resumed_training_ends_where_the_uninterrupted_one_did(tokenizer, run_dir, interrupted):
    course, recipe, whole = interrupted
    point = train.resume_point(course, recipe, train.Split(4))
    assert point.name == "checkpoint-3"
    again = small_trainer(tokenizer, run_dir / "checkpoints")
    again.train(resume_from_checkpoint=str(point))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], tensor)


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_passed_over(run_dir, interrupted, file, capsys):
    course, recipe, _ = interrupted
    damaged = run_dir / "checkpoints" / "checkpoint-3" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert train.resume_point(course, recipe, train.Split(4)).name == "checkpoint-2"
    assert "checkpoint-3 不完整" in capsys.readouterr().out


def test_other_recipe_starts_afresh_and_keeps_the_old_checkpoints(run_dir, interrupted):
    course, recipe, _ = interrupted
    assert train.resume_point(course, recipe | {"rate": 1}, train.Split(4)) is None
    assert not list((run_dir / "checkpoints").glob("checkpoint-*"))
    assert list(run_dir.glob("checkpoints-*/checkpoint-3"))


def test_finished_training_is_not_resumed_once_it_is_saved(tokenizer, run_dir):
    course = Course.start()
    train.resume_point(course, {}, train.Split(4))
    trainer = small_trainer(tokenizer, run_dir / "checkpoints", steps=1)
    trainer.train()
    assert train.resume_point(course, {}, train.Split(4)).name == "checkpoint-1"
    trainer.save_model(str(run_dir / "llama3_lora"))
    assert train.resume_point(course, {}, train.Split(4)) is None


def test_a_training_cut_off_keeps_its_split(tokenizer, interrupted):
    course, recipe, trainer = interrupted
    rows = Dataset.from_list(dialogues(20))
    assert train.choose_split(course, recipe, trainer.model, rows, []) == train.Split(4)
    candidates = [train.Split(8)]
    other = train.choose_split(course, recipe | {"rate": 1}, trainer.model, rows, candidates)
    assert other.micro_batch == 8


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


def packer(model):
    """The collator that suits the attention `model` is set to."""
    return train.SharedPrefixCollator(dense=model.config._attn_implementation != train.ROWS)


def assert_equal_to_padded(model, rows, pad, noise=1e-7):
    """Loss to 1e-6, gradients to 1e-5; what counts as a label is counted alike.

    A gradient that is zero by arithmetic (of a query that sees equal keys) is `noise` in both.
    """
    ours = packer(model)(rows)
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


@pytest.mark.parametrize("attention", [train.ROWS, "sdpa", "eager"])
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
    for attention in (train.ROWS, "sdpa"):
        assert_equal_to_padded(random_llama(attention), rows, padded(tokenizer, rows), noise=1e-6)


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


def test_rows_of_a_dialogue_come_one_after_another_and_each_once_an_epoch():
    marks = [90, 91]  # what the template writes before the last answer alone
    rows = []
    for first in (20, 30, 40):
        for asked in ([first], [first, 50], [first, 50, 60]):
            said = [token for question in asked[:-1] for token in (question, 9, 2)]
            prompt = [*P, *said, asked[-1], 9, *marks]
            rows.append({"input_ids": [*prompt, 9, 2], "labels": [-100] * len(prompt) + [9, 2]})
    rows.append({"input_ids": [*P, 20, 21, 9, *marks, 9], "labels": [-100] * 11 + [9]})
    sampler = train.DialogueSampler(rows, seed=0)
    assert [*map(list, sampler.groups)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    orders = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        orders.append([*sampler])
        assert sorted(orders[-1]) == [*range(10)] and len(sampler) == 10
        assert all(b == a + 1 for a, b in zip(orders[-1], orders[-1][1:]) if b % 3 and b < 9)  # noqa: B905
    assert len({tuple(order) for order in orders}) > 1
    again = train.DialogueSampler(rows, seed=0)
    again.set_epoch(4)
    assert [*again] == orders[4]


def lora_losses(folder, collator, micro, accumulation, checkpointing=False):
    """The losses of 5 steps of 8 rows, and of an evaluation whose last batch is not full."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.0)
    packs = isinstance(collator, train.SharedPrefixCollator)
    model = get_peft_model(random_llama(train.ROWS if packs else "sdpa"), config)
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
    losses = lora_losses(
        tmp_path, train.SharedPrefixCollator(dense=False), micro, accumulation, checkpointing
    )
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


def lora(model, dropout=0.0):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=dropout)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_as_large_as_estimated(dtype):
    """What autograd keeps, storage by storage, of a model in the 3B's proportions."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, head_dim=128,
        num_attention_heads=3, num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = lora(LlamaForCausalLM(config).to(dtype), dropout=0.1).train()
    model.set_attn_implementation(train.ROWS)
    rows = Dataset.from_list([row(range(10), [i + j for j in range(20)]) for i in range(10, 26)])
    batch = train.SharedPrefixCollator(dtype, dense=False)(list(rows))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def look(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address comes twice
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        model(**batch, use_cache=False)
    profile = Profile("test", "", "cpu", str(dtype).removeprefix("torch."))
    needs = train.estimate_memory(config, profile, rows, train.Split(16))
    estimated = needs["中间结果"] * train.GIB * 4 / 5  # without the layer for the backward pass
    assert sum(size for size, _ in kept.values()) == pytest.approx(estimated, rel=0.1)
    own = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert needs["模型权重"] * train.GIB == own
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert needs["适配器与优化器"] * train.GIB == 16 * trained


@pytest.mark.newest
def test_the_3b_fits_where_we_say(genuine):
    """The shape of Llama-3.2-3B and rows as long as the dataset's: which split on which card?"""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    rows = Dataset.from_list([row(range(80), range(i, i + 30)) for i in range(100, 400)])

    def largest(profile, gib):
        needs = {
            split: train.estimate_memory(config, PROFILES[profile], rows, split)
            for split in train.splits(PROFILES[profile])
        }
        assert needs[train.Split(16)]["模型权重"] < 6
        return train.fitting(PROFILES[profile], needs, gib)[0]

    assert largest("gpu-bf16", 79) == train.Split(16)
    assert largest("gpu-fp16", 14.4).micro_batch >= 8  # a T4
    assert largest("gpu-4bit", 7.5).micro_batch >= 4  # a card of 8 GB
    assert largest("gpu-4bit", 3.2) == train.Split(1, checkpointing=True)
    with pytest.raises(CourseError, match="训练放不进内存") as error:
        largest("gpu-bf16", 6)
    assert "gpu-4bit" in str(error.value)


def test_every_split_is_16_rows_and_the_ladder_goes_down():
    ladder = train.splits(PROFILES["gpu-bf16"])
    assert [(s.micro_batch, s.accumulation, s.checkpointing) for s in ladder] == [
        (16, 1, False), (8, 2, False), (4, 4, False), (2, 8, False), (1, 16, False), (1, 16, True),
    ]  # fmt: skip
    assert ladder[-1].smaller() is None
    with pytest.raises(CourseError, match="16"):
        train.splits(Profile("test", "", "cpu", "float32", micro_batch=3))


def test_a_lack_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as no_memory:
        torch.empty(2**55)
    assert train.out_of_memory(no_memory.value)
    assert train.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert train.out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not train.out_of_memory(other.value)


class Cramped(torch.nn.Module):
    """Stands in for a GPU of little memory: a batch of too many tokens makes it fail as a real one.

    From the `since`-th pass on; with checkpointing there is room for `relief` times as many.
    """

    def __init__(self, inner, room, since=0, relief=1):
        super().__init__()
        self.inner, self.room, self.since, self.relief, self.passes = inner, room, since, relief, 0

    def forward(self, hidden_states, *args, **kwargs):
        self.passes += 1
        room = self.room * (self.relief if self.inner.gradient_checkpointing else 1)
        if self.training and self.passes > self.since and hidden_states.shape[1] > room:
            # big enough to fail on every machine
            torch.empty(2**55)
        return self.inner(hidden_states, *args, **kwargs)


def packed_training(folder, micro, cramped=None, steps=6):
    """A training of `steps` steps of 16 rows without dropout: its losses, and its trainer."""
    model = random_llama(train.ROWS)
    trainer_model = lora(model)
    if cramped:
        layers = model.model.layers
        layers[1] = Cramped(layers[1], **cramped)
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=micro, learning_rate=1e-2,
        gradient_accumulation_steps=16 // micro, logging_steps=1, save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = train.CourseTrainer(
        model=trainer_model, args=args, train_dataset=dialogues(60),
        data_collator=train.SharedPrefixCollator(dense=False),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize(
    "cramped, ends_with",
    [
        ({"room": 75}, train.Split(4)),
        ({"room": 75, "since": 3}, train.Split(4)),
        ({"room": 5, "since": 2, "relief": 100}, train.Split(1, checkpointing=True)),
    ],
)
def test_out_of_memory_goes_on_smaller_with_the_same_losses(tmp_path, capsys, cramped, ends_with):
    expected, _ = packed_training(tmp_path / "a", 16)
    capsys.readouterr()
    losses, trainer = packed_training(tmp_path / "b", 16, cramped)
    assert trainer.split == ends_with
    assert len(losses) == 6 and losses == pytest.approx(expected, abs=1.01e-4)
    said = capsys.readouterr().out
    assert said.count("内存不够") >= 2 and str(ends_with) in said
    if "since" in cramped:
        assert "第 3 步内存不够" in said or "第 4 步内存不够" in said


def test_out_of_memory_at_the_end_of_the_ladder_says_what_to_do(tmp_path):
    with pytest.raises(CourseError, match="训练放不进内存"):
        packed_training(tmp_path, 16, {"room": 5})


def test_the_last_step_is_filled_without_changing_it(tmp_path):
    rows = dialogues(19)
    filled = train._fill_last_step(rows)
    assert len(filled) == 32 and filled[:19] == rows
    assert all(set(one["labels"]) == {-100} for one in filled[19:])
    of_dataset = train._fill_last_step(Dataset.from_list(rows))
    assert of_dataset.to_list() == filled
    model = random_llama(train.ROWS)
    alone = train.SharedPrefixCollator()(filled[30:])
    assert model(**alone, num_items_in_batch=7).loss.item() == 0


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path

    sys.path[:0] = [{tests!r}, {notebooks!r}]
    import test_train
    from test_train import *

    def whole_training():
        torch.set_num_threads(1)
        course = Course.start()
        recipe, split = {{}}, train.Split(8)
        trainer = test_train.resumable_trainer(course.run_dir / "checkpoints")
        trainer.train(resume_from_checkpoint=train.resume_point(course, recipe, split))

    draw = random.Random(int(sys.argv[1]))
    moments = sorted(draw.sample(range(2, 180), int(sys.argv[2])))  # steps
    folder, in_a_save = Path(os.environ["HUANHUAN_OUTPUT"]) / "checkpoints", 0
    for number, moment in enumerate([*moments, None]):
        child = os.fork()  # torch is imported, and has computed nothing yet: a fork is safe
        if not child:
            whole_training()
            os._exit(0)
        if moment is None:
            break
        while not any(int(p.name[11:]) >= moment for p in folder.glob("checkpoint-*")):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        while number % 2 and not (folder / "unfinished").exists():
            time.sleep(0.0002)
        in_a_save += (folder / "unfinished").exists()
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before it was killed"
    assert os.waitpid(child, 0)[1] == 0
    print("killed while a checkpoint was being written:", in_a_save)
"""


def resumable_trainer(folder):
    """240 steps with dropout, a checkpoint every second step."""
    args = TrainingArguments(
        folder, max_steps=240, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, save_steps=2, save_total_limit=2, use_cpu=True,
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    return train.CourseTrainer(
        model=lora(random_llama(train.ROWS), dropout=0.1), args=args, train_dataset=dialogues(70),
        data_collator=train.SharedPrefixCollator(dense=False),
    )  # fmt: skip


def losses_of(run_dir):
    """Every loss that the last checkpoint of a run remembers."""
    last = max((run_dir / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.newest
def test_killed_at_20_random_moments_the_losses_are_those_of_a_run_never_killed(tmp_path):
    code = textwrap.dedent(KILLED).format(tests=str(ROOT / "tests"), notebooks=str(NOTEBOOKS))
    runs = {}
    for kills in (0, 20):
        run_dir = tmp_path / str(kills)
        done = subprocess.run(
            [sys.executable, "-c", code, "7", str(kills)],
            env=os.environ | {"HUANHUAN_OUTPUT": str(run_dir)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        runs[kills] = losses_of(run_dir)
        said = done.stdout
    assert "接着训练" in said
    assert int(said.split("being written: ")[1]) >= 5
    assert len(runs[0]) == 240 and runs[20] == runs[0]


def test_stopped_by_hand_at_20_random_steps_the_losses_are_those_of_a_run_never_stopped(
    run_dir, capsys, monkeypatch
):
    """■ sends SIGINT. The step it falls into is finished and saved; nothing is done twice."""
    steps = set(random.Random(3).sample(range(1, 240), 20))
    one_step = train.CourseTrainer.training_step

    def pressed(self, *args, **kwargs):
        if self.state.global_step + 1 in steps:
            steps.remove(self.state.global_step + 1)
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(self, *args, **kwargs)

    def whole_training(folder):
        course = Course(PROFILES["cpu-tiny"], "", folder, {})
        trainer, point = resumable_trainer(folder / "checkpoints"), None
        point = train.resume_point(course, {}, train.Split(8))
        trainer.train(resume_from_checkpoint=point)

    whole_training(run_dir / "straight")
    monkeypatch.setattr(train.CourseTrainer, "training_step", pressed)
    for left in range(20, 0, -1):
        at = min(steps)
        with pytest.raises(CourseError, match=f"停在第 {at} 步，已存好；再运行这一格就接着训练"):
            whole_training(run_dir / "stopped")
        assert len(steps) == left - 1
    whole_training(run_dir / "stopped")
    assert losses_of(run_dir / "stopped") == losses_of(run_dir / "straight")
    assert "Traceback" not in capsys.readouterr().err


def prepared_run(finished_run, run_dir, **overrides):
    """A run directory that 01 and 02 have been through, with a profile of its own."""
    course = Course.start(epochs=1, logging_steps=1, save_steps=20, **overrides)
    for name in ("data", "model"):
        course.keep(name, finished_run.path(name))
    with course.making("tokenized", **finished_run.record("tokenized")["results"]) as folder:
        shutil.copytree(finished_run.path("tokenized"), folder, dirs_exist_ok=True)
    return course


def train_script(processes, run_dir, wait=True):
    """Notebook 03 as a program, run by torchrun in so many processes, as `make train` runs it."""
    script = subprocess.run(
        [sys.executable, "-m", "huanhuan", "script", "03_train_lora"],
        cwd=NOTEBOOKS, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={processes}", script]
    environment = os.environ | {"HUANHUAN_OUTPUT": str(run_dir)}
    if not wait:
        with open(run_dir / "said.txt", "w") as said:
            return subprocess.Popen(
                command, cwd=NOTEBOOKS, env=environment, stdout=said, stderr=said
            )
    done = subprocess.run(command, cwd=NOTEBOOKS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one_process(finished_run, tmp_path_factory):
    """The losses of notebook 03's training in one process, without dropout."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUANHUAN_OUTPUT", str(run_dir))
        prepared_run(finished_run, run_dir, lora_dropout=0.0)
    train_script(1, run_dir)
    losses = losses_of(run_dir)
    assert len(losses) > 80 and sum(losses[-20:]) / 20 < sum(losses[:10]) / 10 - 0.3
    return losses


def test_two_processes_train_as_one(finished_run, run_dir, one_process):
    course = prepared_run(finished_run, run_dir, lora_dropout=0.0)
    said = train_script(2, run_dir)
    assert losses_of(run_dir) == pytest.approx(one_process, abs=1.01e-4)
    assert "8 × 1" in said  # twice 8 rows a step
    assert said.count("✅ 03_train_lora 完成") == 1  # only the first process speaks
    assert Course.resume("adapter").path("adapter").is_relative_to(course.run_dir)
    assert (run_dir / "loss.svg").exists()


AGREE = """
    import sys
    sys.path[:0] = [{tests!r}, {notebooks!r}]
    from test_train import *

    rank = int(os.environ["RANK"])
    likes = [8, 2][rank]
    train._step_seconds = lambda model, rows, split, profile, collator: abs(split.micro_batch - likes) + 1.0
    model = lora(random_llama())
    candidates = [train.Split(8), train.Split(4), train.Split(2)]
    rows = Dataset.from_list(dialogues(20))
    split = train.choose_split(Course.start(), {{}}, model, rows, candidates)
    args = TrainingArguments({folder!r}, use_cpu=True, report_to="none")
    print(f"process {{rank}} of {{args.world_size}}: {{split.micro_batch}}", flush=True)
    torch.distributed.destroy_process_group()
"""


def test_processes_that_measure_differently_take_the_first_ones_split(run_dir, tmp_path):
    program = tmp_path / "agree.py"
    program.write_text(
        textwrap.dedent(AGREE).format(
            tests=str(ROOT / "tests"), notebooks=str(NOTEBOOKS), folder=str(tmp_path)
        ),
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 of 2: 8" in done.stdout and "process 1 of 2: 8" in done.stdout


@pytest.mark.newest
def test_the_script_killed_goes_on_to_the_same_losses(finished_run, run_dir, one_process):
    prepared_run(finished_run, run_dir, lora_dropout=0.0)
    running = train_script(1, run_dir, wait=False)
    while not (run_dir / "checkpoints" / "checkpoint-40").exists():
        assert running.poll() is None, (run_dir / "said.txt").read_text()[-3000:]
        time.sleep(0.01)
    launcher = psutil.Process(running.pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    running.wait()
    said = train_script(1, run_dir)
    assert "从 checkpoint-40 接着训练" in said or "从 checkpoint-60 接着训练" in said
    assert losses_of(run_dir) == one_process


@pytest.mark.newest
def test_4_bit_weights_train_and_answer(finished_run, run_dir):
    """The profile of small cards, on the CPU: bitsandbytes works there too."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    course = prepared_run(finished_run, run_dir, quantized=True)
    assert isinstance(course.quantization(), BitsAndBytesConfig)
    model = AutoModelForCausalLM.from_pretrained(
        course.path("model"), device_map="cpu", quantization_config=course.quantization()
    )
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.weight.dtype == torch.uint8
    train_script(1, run_dir)
    losses = losses_of(run_dir)
    assert sum(losses[-10:]) < sum(losses[:10]) - 5
    done = run_course("04_infer", HUANHUAN_OUTPUT=str(run_dir))
    assert done.returncode == 0, done.stderr


def test_4_bits_without_bitsandbytes_say_what_to_install(run_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CourseError, match="pip install bitsandbytes"):
        Course.start(quantized=True).quantization()
