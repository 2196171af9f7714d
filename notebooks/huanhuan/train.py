"""Room 03: pack rows, fit the step into the memory, train through crashes, save for any machine."""

import contextlib
import ctypes
import filecmp
import gc
import json
import logging
import random
import re
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from huanhuan import CourseError, read_json
from huanhuan.course import (
    ARTEFACTS,
    PROCESSES,
    RANK,
    ROWS_PER_STEP,
    SHARDED,
    Course,
    Profile,
    check_adapter,
    lasting,
    peak_memory_gib,
    set_aside,
    write_json,
    writing,
)
from huanhuan.prompt import fixed_template

GIB = 2**30
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TOO_BIG = """训练放不进内存。可以这样做：
1. 关掉别的笔记本的内核（菜单 内核 → 关闭所有内核 / Kernel → Shut Down All Kernels），重新运行 03；
2. 对话很长的话，回到 01，用 Course.start(max_length=256) 截短；
3. NVIDIA 显卡：pip install bitsandbytes，把环境变量 HUANHUAN_PROFILE 设成 gpu-4bit，用 4 位权重训练；
4. 换一个小一些的模型，例如把 HUANHUAN_MODEL 设成 Qwen/Qwen2.5-0.5B-Instruct。"""


# Under this name transformers calls attend_rows, for a model set to it (set_attn_implementation).
ROWS = "rows"


def attend_rows(
    module, query, key, value, attention_mask, queries=None, keys=None, places=None, **options
):
    """Attention of rows that were packed: each over what it sees, and nothing else is computed.

    `query`, `key` and `value` are (1, heads, S, width). The tokens of R rows, `queries` (R, Q), attend
    to the positions `keys` (R, K) under `attention_mask` (R, 1, Q, K), one padded batch;
    `places` (S,) say where in it the result of each position stands. Without these three it is
    transformers' own sdpa.
    """
    if queries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def rows(states, where):
        taken = states[0].index_select(1, where.flatten())
        return taken.unflatten(1, where.shape).transpose(0, 1)

    query, key, value = rows(query, queries), rows(key, keys), rows(value, keys)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output.flatten(0, 1).index_select(0, places)[None], None


AttentionInterface.register(ROWS, attend_rows)
AttentionMaskInterface.register(ROWS, sdpa_mask)


class SharedPrefixCollator:
    """Packs a micro-batch into one row in which tokens that rows begin with alike stand only once.

    All dialogues of the course begin with the same system prompt, and the turns of one dialogue with
    each other. In a causal model a token's state depends on nothing but the tokens before it, so
    that a common beginning needs to be computed only once: the rows form a tree, and every token
    sees its own ancestors. Loss and gradient are those of the padded batch (tests/test_train.py), at
    fewer positions, and only those that predict a label go through the head.

    The idea for pairs of answers to one prompt: Prefix Sharing, https://arxiv.org/abs/2410.20305.

    Args:
        dtype: of a dense attention mask. float32 suits everything; the model's own saves a
            conversion in every layer on a GPU.
        dense: one mask of all positions against all, which every model takes: time and memory grow
            with the square of the micro-batch's tokens. False for a model that is set to ROWS.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, dense: bool = True):
        self.dtype, self.dense = dtype, dense

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """One batch for a causal model of transformers, from rows with `input_ids` and `labels`.

        A token is shared only where a row carries no label yet, and the token before a row's first
        label is always the row's own. Rows with nothing in common are packed all the same.

        Returns, with S positions of which n predict a label:
            input_ids, position_ids, labels: (1, S), int64. Positions count within each row; the
                model does not look at `labels`, but the Trainer asks for them and counts them.
            logits_to_keep: (n,), int64: the positions that predict a label.
            shift_labels: (1, n), int64: the labels that they predict.
            attention_mask, queries, keys, places: what :func:`attend_rows` takes. Or, if dense,
                attention_mask alone: (1, 1, S, S), added to the scores: 0 to see, -inf not to. A
                boolean one would do for sdpa; eager attention adds it as 0 and 1, without a word.
        """
        ids, labels, positions, spans = [], [], [], []
        tokens, path = [], []  # of the row before; path: where its tokens stand in the packed row
        for row in sorted(rows, key=lambda row: row["input_ids"]):  # the likest become neighbours
            before, tokens = tokens, row["input_ids"]
            unlabelled = next((i for i, x in enumerate(row["labels"]) if x != -100), len(tokens))
            shared = _alike(before, tokens[: max(unlabelled - 1, 0)])
            start = len(ids)
            ids += tokens[shared:]
            labels += row["labels"][shared:]
            positions += range(shared, len(tokens))
            path = path[:shared] + list(range(start, len(ids)))
            spans.append((start, shared, path))

        labels = torch.tensor(labels)
        predicted = labels.clone()
        predicted[[start for start, _, _ in spans]] = -100  # nothing stands before a row's first
        where = (predicted != -100).nonzero().squeeze(1)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": labels[None],
            "logits_to_keep": where - 1,
            "shift_labels": predicted[None, where],
        } | (self._dense(spans, len(ids)) if self.dense else self._in_rows(spans))

    def _dense(self, spans, size: int) -> dict[str, torch.Tensor]:
        longest = max(len(path) for _, _, path in spans)
        causal = torch.full((longest, longest), -torch.inf, dtype=self.dtype).triu(1)
        mask = torch.full((size, size), -torch.inf, dtype=self.dtype)
        for start, shared, path in spans:
            end = start + len(path) - shared
            mask[start:end, path] = causal[shared : len(path), : len(path)]
        return {"attention_mask": mask[None, None]}

    def _in_rows(self, spans) -> dict[str, torch.Tensor]:
        own = [torch.tensor(path[shared:]) for _, shared, path in spans]
        queries = pad_sequence(own, batch_first=True)
        keys = pad_sequence([torch.tensor(path) for _, _, path in spans], batch_first=True)
        shared = torch.tensor([shared for _, shared, _ in spans])
        depth = shared[:, None] + torch.arange(queries.shape[1])  # of every query in its row
        # Causal is enough: what pads the keys stands behind all of the row's own tokens.
        mask = torch.arange(keys.shape[1]) <= depth[:, :, None]
        places = [
            row * queries.shape[1] + torch.arange(len(tokens)) for row, tokens in enumerate(own)
        ]
        return {
            "attention_mask": mask[:, None],
            "queries": queries,
            "keys": keys,
            "places": torch.cat(places),
        }


class DialogueSampler(Sampler):
    """Rows in random order, those of one dialogue one after another, the first turn first.

    So they come into one micro-batch, which computes what they begin with once. Every row is still
    seen once an epoch, and every dialogue is as likely to be in a step as any other. A row belongs to
    the one before it where it begins with that one's prompt, but for what the template writes at its
    end (some templates write it only before the last answer).
    """

    def __init__(self, rows, seed: int):
        self.seed, self.epoch, self.groups = seed, 0, []
        before: list[int] = []
        for place, row in enumerate(rows):
            ids, labels = row["input_ids"], row["labels"]
            prompt = ids[: next((i for i, x in enumerate(labels) if x != -100), len(ids))]
            alike = _alike(before, prompt) + _alike(before[::-1], prompt[::-1])
            if before and alike >= len(before):
                self.groups[-1].append(place)
            else:
                self.groups.append([place])
            before = prompt

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        order = self.groups.copy()
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return chain.from_iterable(order)


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def lora_targets(model, names: list[str]) -> list[str]:
    """Names of the layers beside which LoRA goes: `names` where the model has them all.

    Else every linear layer but the head that gives the scores, as some families join or name them
    in their own way.
    """
    head = model.get_output_embeddings()
    linear = {
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]  # of a model that has its LoRA already
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and ".lora_" not in name
    }
    return names if linear >= {*names} else sorted(linear)


def shares_prefixes(model, rows, collator: SharedPrefixCollator) -> bool:
    """Whether `model` gives a row that `collator` packed what it gives the row alone.

    The two longest of `rows` are packed, in evaluation mode. What the second gets must not change
    with the words of the first (1e-6 of its size), and must be what both get by themselves, scores
    and loss, as exactly as numbers of that many digits allow (float32 1e-5, float16 1e-2, bfloat16
    5e-2). Not so where a layer hands a state from token to token, or reads the mask in its own way.
    """
    if getattr(model, "_is_stateful", False):  # transformers' own word for such layers
        return False
    longest = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    longest = (longest[-2:] * 2)[:2]  # a single row stands beside itself
    pair = [{name: rows[i][name] for name in ("input_ids", "labels")} for i in longest]
    pair = sorted(pair, key=lambda row: row["input_ids"])  # as they will be packed
    dtype, training = compute_dtype(model), model.training
    batch = collator(pair)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    first = len(pair[0]["input_ids"])
    shared = first + len(pair[-1]["input_ids"]) - batch["input_ids"].shape[1]
    inputs = {n: x for n, x in batch.items() if "label" not in n}
    inputs["logits_to_keep"] = torch.arange(first, batch["input_ids"].shape[1]).to(model.device)
    other = batch["input_ids"].clone()
    other[0, shared:first] = other[0, -1]  # the first row says something else
    model.eval()
    try:
        with torch.no_grad():
            together = model(**batch, use_cache=False)
            second = model(**inputs, use_cache=False).logits
            changed = model(**inputs | {"input_ids": other}, use_cache=False).logits
            alone = []
            for row in pair:
                ids, labels = (torch.tensor(row[n]).to(model.device) for n in row)
                scores = model(input_ids=ids[None], use_cache=False).logits[0]
                alone.append(scores[:-1][labels[1:] != -100])
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        if out_of_memory(error):
            raise CourseError(TOO_BIG) from None
        return False  # it does not take such a mask, or cannot keep to the labelled positions
    finally:
        model.train(training)
    alone, packed = torch.cat(alone), together.logits[0]
    if packed.shape != alone.shape:
        return False
    loss = torch.nn.functional.cross_entropy(alone.float(), batch["shift_labels"][0])
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    return (
        _apart(changed, second) <= 1e-6
        and _apart(packed, alone) <= tolerance
        and _apart(together.loss, loss) <= tolerance
    )


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def compute_dtype(model) -> torch.dtype:
    """In which `model` computes: that of its norms, for its matrices may be packed into 4 bits."""
    return next(p.dtype for p in model.parameters() if p.ndim == 1 and p.dtype.is_floating_point)


def choose_collator(model, tokenizer, rows):
    """The collator for `model`: packed where that is proven (:func:`shares_prefixes`), else padded.

    Of the packed ones the one that attends row by row, for which `model` is set to ROWS, else dense.
    """
    dtype, usual = compute_dtype(model), model.config._attn_implementation
    dense = SharedPrefixCollator(dtype)
    if SHARDED:  # a model that is to be cut up runs nowhere whole
        return dense
    if usual in ("sdpa", ROWS):  # ROWS is sdpa for every row: no other kind may be exchanged for it
        with contextlib.suppress(ValueError):  # its attention is its own
            model.set_attn_implementation(ROWS)
            by_rows = SharedPrefixCollator(dtype, dense=False)
            if shares_prefixes(model, rows, by_rows):
                return by_rows
        model.set_attn_implementation(usual)
    if shares_prefixes(model, rows, dense):
        return dense
    print(
        "这种模型的一条对话会受同一批里别的对话影响，不能合并开头：改用补齐的批次，慢一些，结果一样。"
    )
    return transformers.DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)


@contextlib.contextmanager
def as_if_trained(model) -> Iterator[None]:
    """Inside, every B of the adapter holds small random numbers instead of zeros, as after training.

    A fresh B is zero, and so is then the gradient of every A: half of the adapter would go untested.
    """
    fresh = [p for name, p in model.named_parameters() if "lora_B" in name]
    before = [p.detach().clone() for p in fresh]
    with torch.random.fork_rng():
        for p in fresh:
            torch.nn.init.normal_(p, std=0.02)
        try:
            yield
        finally:
            for p, values in zip(fresh, before, strict=True):
                p.data.copy_(values)


@contextlib.contextmanager
def trial_adapter(model, config: LoraConfig) -> Iterator[None]:
    """Inside, a fresh adapter by `config` is the one that learns; then it is thrown away."""
    only_default(model)
    model.add_adapter("trial", config)
    model.set_adapter("trial")
    try:
        yield
    finally:
        only_default(model)


def only_default(model) -> None:
    """Make the adapter that is trained the only one: a ■ may have left another beside it, at work."""
    if "default" in getattr(model, "peft_config", {}):
        model.set_adapter("default")
        for name in [name for name in model.peft_config if name != "default"]:
            model.delete_adapter(name)


@contextlib.contextmanager
def read_back(model, folder: Path) -> Iterator[None]:
    """Inside, the adapter in `folder`, read back from the disk, is at work instead of the one in memory."""
    only_default(model)
    try:
        model.load_adapter(folder, adapter_name="reloaded")
        model.set_adapter("reloaded")
        yield
    finally:
        only_default(model)


def trainable_share(model) -> str:
    """One line: how many parameters train, of how many."""
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"可训练参数 {train:,} 个，占全部 {total:,} 个的 {train / total:.2%}"


@dataclass(frozen=True)
class Split:
    """How the 16 rows of a step go through the memory: `micro_batch` at a time, in every process."""

    micro_batch: int
    checkpointing: bool = False
    seconds: float | None = None  # a step, where it was timed

    @property
    def accumulation(self) -> int:
        return ROWS_PER_STEP // (self.micro_batch * PROCESSES)

    def __str__(self) -> str:
        return f"{self.micro_batch} × {self.accumulation}" + "，梯度检查点" * self.checkpointing

    def smaller(self) -> "Split | None":
        """The next one down that needs less memory; None after the last."""
        if self.micro_batch > 1:
            return Split(self.micro_batch // 2, self.checkpointing)
        return None if self.checkpointing else Split(1, checkpointing=True)


def splits(profile: Profile) -> list[Split]:
    """All that this profile can try, the largest first.

    Raises CourseError where 16 rows cannot be shared out like that.
    """
    most = min(profile.micro_batch or ROWS_PER_STEP, ROWS_PER_STEP // PROCESSES)
    if most * PROCESSES == 0 or ROWS_PER_STEP % (most * PROCESSES) or most & (most - 1):
        raise CourseError(
            f"每一步 {ROWS_PER_STEP} 条对话，没法分给 {PROCESSES} 个进程、每次 {most} 条："
            "两个数都请用 1、2、4、8 或 16。"
        )
    ladder = [Split(most, profile.gradient_checkpointing)]
    while smaller := ladder[-1].smaller():
        ladder.append(smaller)
    return ladder


def _fullest(rows, micro_batch: int) -> list[dict]:
    """The micro-batch with the most tokens of one shuffled epoch."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    batches = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    return [rows[i] for i in max(batches, key=lambda batch: sum(lengths[i] for i in batch))]


def estimate_memory(
    config, profile: Profile, rows, split: Split, collator=None
) -> dict[str, float]:
    """GiB that training needs at its fullest, part by part. Nothing is loaded.

    `config` is the model's, of any family; `rows` a Dataset with `input_ids` and `labels`; `collator`
    what packs or pads them (packed unless given).

    What autograd keeps for the backward pass is counted on a forward pass with tensors that have
    shapes and no content. One layer is added for what the backward pass itself needs.
    """
    # bfloat16 stands for float16 too: it is as large, and a CPU computes in it as a GPU does
    dtype = torch.float32 if profile.dtype == "float32" else torch.bfloat16
    text = config.get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    in_maps = sum(m.weight.numel() for m in maps)
    # 4 bits, and 8 bits of scale for every 64 of them, which have scales themselves (nf4, double)
    map_size = 0.516 if profile.quantized else dtype.itemsize
    weights = (model.num_parameters() - in_maps) * dtype.itemsize + in_maps * map_size
    targets = lora_targets(model, SEVEN)
    beside = [m for n, m in model.named_modules() if m in maps and n.rsplit(".", 1)[-1] in targets]
    adapter = profile.lora_r * sum(m.in_features + m.out_features for m in beside)

    batch = (collator or SharedPrefixCollator(dtype, dense=False))(
        _fullest(rows, split.micro_batch)
    )
    try:
        if "queries" in batch:
            model.set_attn_implementation(ROWS)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.1)
        kept = _kept_for_backward(get_peft_model(model, lora), batch, dtype, text.vocab_size)
    except (RuntimeError, TypeError, ValueError):  # it does not run without content
        wide = getattr(text, "intermediate_size", 4 * text.hidden_size)
        layer = (
            (52 * text.hidden_size + 12 * wide) * dtype.itemsize / 2
        )  # bytes a token, as a Llama
        kept = batch["input_ids"].numel() * text.num_hidden_layers * layer
    layer = kept / text.num_hidden_layers
    if split.checkpointing:  # the inputs of all layers, and one layer computed again
        inputs = batch["input_ids"].numel() * text.hidden_size * dtype.itemsize
        kept = text.num_hidden_layers * inputs + layer
    scored = batch["logits_to_keep"] if "logits_to_keep" in batch else batch["input_ids"]
    if SHARDED:
        weights, adapter = weights / PROCESSES, adapter / PROCESSES
    return {
        "模型权重": weights / GIB,
        "适配器与优化器": adapter * 16 / GIB,  # value, gradient and Adam's two, all float32
        "中间结果": (kept + layer) / GIB,
        # scores, in float32 too where they are not yet; their log-softmax; the gradients of both
        "预测分数": scored.numel() * text.vocab_size * (12 if dtype.itemsize == 4 else 16) / GIB,
    }


def _kept_for_backward(model, batch: dict, dtype: torch.dtype, vocabulary: int) -> float:
    """Bytes that autograd keeps of one pass of `model`, which lies on "meta", without the scores."""
    mode, kept = FakeTensorMode(allow_non_fake_inputs=True), {}
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with mode:
        held = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in [*model.named_parameters(), *model.named_buffers()]
        }
        batch = {
            name: mode.from_tensor(value.to(dtype) if value.is_floating_point() else value)
            for name, value in batch.items()
        }
        own = {tensor.untyped_storage()._cdata for tensor in held.values()}

        def look(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own and tensor.shape[-1:] != (vocabulary,):
                kept[storage._cdata] = (storage.nbytes(), tensor)  # held: no address comes twice
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
        with autocast, torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
            inputs = batch | {"use_cache": False}
            torch.func.functional_call(model.train(), held, kwargs=inputs)
    return sum(size for size, _ in kept.values())


def free_memory(profile: Profile) -> float:
    """GiB that training may use now: of the GPU, or of the machine's main memory."""
    if profile.device == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB
    return psutil.virtual_memory().available / GIB


def fitting(profile: Profile, needs: dict[Split, dict[str, float]], free: float) -> list[Split]:
    """Of the splits whose needs were estimated, those worth timing in `free` GiB.

    The three largest without checkpointing, or else the first that fits at all; only one where the
    profile says which. Raises CourseError where none fits. A tenth of the memory is left for what
    the estimate does not know.
    """
    fit = [split for split, parts in needs.items() if sum(parts.values()) <= 0.9 * free]
    if not fit:
        raise CourseError(TOO_BIG)
    return [s for s in fit if not s.checkpointing][: 1 if profile.micro_batch else 3] or fit[:1]


def spare_memory(profile: Profile, needs: dict, free: float) -> None:
    """On a CPU where memory is short: give back what is freed at once, at a third to a half more time.

    Else the C library keeps the holes between what is in use, and a process may hold nearly twice
    what :func:`estimate_memory` says that it uses.
    """
    least = min(sum(parts.values()) for parts in needs.values())
    if profile.device == "cpu" and 2 * least > free:
        with contextlib.suppress(OSError, AttributeError):  # glibc's: Linux only
            ctypes.CDLL("libc.so.6").mallopt(-3, 2**18)  # M_MMAP_THRESHOLD, bytes
            print("内存不宽裕：用完的内存马上还给系统，慢一些，省一些。")


def memory_held(profile: Profile) -> float:
    """GiB of main memory that this process holds now; 0 on a GPU, which holds nothing yet."""
    return 0.0 if profile.device == "cuda" else psutil.Process().memory_info().rss / GIB


def memory_peak(profile: Profile) -> float:
    """The most memory held so far, in GiB: of the GPU, or of the process's main memory."""
    if profile.device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return peak_memory_gib()


def checkpoint_activations(model) -> None:
    """Keep only every layer's input for the backward pass, and compute the rest again."""
    model.enable_input_require_grads()  # or the frozen embedding would cut the gradient off
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def out_of_memory(error: BaseException) -> bool:
    """Was it the memory? torch has a type for it on a GPU, and only words on a CPU."""
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or should_reduce_batch_size(error)
        or "DefaultCPUAllocator: not enough memory" in str(error)
    )


def _step_seconds(model, rows: list[dict], split: Split, profile: Profile, collator) -> float:
    """One forward and backward pass over `rows` in micro-batches, timed."""
    dtype = getattr(torch, profile.dtype)
    start = time.perf_counter()
    for first in range(0, len(rows), split.micro_batch):
        batch = collator(rows[first : first + split.micro_batch])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        float(loss.detach())  # waits for the GPU
    return time.perf_counter() - start


def choose_split(
    course: Course, recipe: dict, model, rows, candidates: list[Split], collator=None
) -> Split:
    """The fastest of the candidates on this machine; a training that was cut off keeps its own.

    Each takes a micro-batch as full as they come through once, to see that it fits, then 16 rows
    from all over the data, timed. Weights, gradients and random state stay as they were. Of several
    processes, all take what the first found. Raises CourseError where none fits.
    """
    unfinished = _unfinished(course.run_dir / "checkpoints", _whole_recipe(course, recipe))
    if unfinished:
        print("上次的训练还没有完，接着用它的批次划分。")
        return Split(**unfinished["split"])
    if SHARDED:  # a model that is to be cut into parts runs nowhere whole
        return candidates[0]
    typical = [rows[i] for i in range(0, len(rows), -(-len(rows) // ROWS_PER_STEP))]
    if collator is None:
        by_rows = model.config._attn_implementation == ROWS
        collator = SharedPrefixCollator(compute_dtype(model), dense=not by_rows)
    timed = []
    for split in candidates:
        if split.checkpointing:
            checkpoint_activations(model)
        try:
            with torch.random.fork_rng():
                fullest = _fullest(rows, split.micro_batch)
                _step_seconds(model, fullest, split, course.profile, collator)
                seconds = _step_seconds(model, typical, split, course.profile, collator)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            print(f"{split}：放不下")
        else:
            seconds *= ROWS_PER_STEP / len(typical) / PROCESSES
            timed.append(Split(split.micro_batch, split.checkpointing, seconds))
            print(f"{split}：一步约 {seconds:.2f} 秒")
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    if not timed:
        raise CourseError(TOO_BIG)
    fastest = min(timed, key=lambda split: split.seconds)
    if PROCESSES == 1:
        return fastest
    PartialState(cpu=course.profile.device == "cpu")  # by which they can talk to each other
    return broadcast_object_list([fastest])[0]


def half_hour(split: Split, rows: int, epochs: int) -> str:
    """What fits into 30 minutes, as a sentence, where so many rows and epochs do not."""
    seen = int(1800 / (split.seconds or 1e-9)) * ROWS_PER_STEP  # rows, each as often as it is seen
    if seen >= rows * epochs:
        return ""
    fits = f"{rows} 条 × {seen // rows} 轮" if seen >= rows else f"{seen} 条 × 1 轮"
    return f"30 分钟够训练 {fits}。"


def trial_steps(seconds: float, steps: int, trainings: int) -> int:
    """Steps that each of so many trial trainings may take: in all a tenth of the training's time.

    The training took so many `seconds` and `steps`. 20 seconds are granted where the training took as long; never more than
    25 steps each. Where ten steps do not fit, too few to show anything, 0, and a sentence.
    """
    each = (
        max(seconds / 10, min(seconds, 20)) / trainings / (seconds / max(steps, 1)) - 4
    )  # 4: what measuring takes
    if each >= 10:
        return min(int(each), 25)
    print(
        f"这里一步约 {seconds / max(steps, 1):.1f} 秒，短训练在允许的时间里看不出差别，下面几格跳过。"
    )
    return 0


class Progress(transformers.TrainerCallback):
    """Says how far the training is: step, loss, minutes left. Where it is logged, or after 8 seconds."""

    def on_train_begin(self, args, state, control, **_):
        self.began, self.said, self.first = time.time(), 0.0, state.global_step

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:  # the mean since the one before
            self.say(state, f"，损失 {float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **_):
        done, last = state.global_step - self.first, state.global_step == state.max_steps
        # What this step is to log comes after it.
        if not control.should_log and (done == 1 or last or time.time() - self.said >= 8):
            self.say(state)

    def say(self, state, loss: str = "") -> None:
        if state.is_world_process_zero:
            self.said, to_go = time.time(), state.max_steps - state.global_step
            left = lasting((self.said - self.began) / (state.global_step - self.first) * to_go)
            print(f"… 第 {state.global_step} / {state.max_steps} 步{loss}，还要 {left}")


class Stop(transformers.TrainerCallback):
    """Lets the step that is running end, saves and stops, at ■ (SIGINT) or SIGTERM.

    And gives every step a seed of its own, so that dropout does not depend on where a training was
    cut off. A second ■ does not wait for the step.
    """

    def __init__(self):
        self.asked, self._former = False, {}

    def on_train_begin(self, args, state, control, **_):
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("收到，这一步算完就停……")

    def give_back(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def on_step_begin(self, args, state, control, **_):
        torch.manual_seed(args.seed + state.global_step * PROCESSES + RANK)

    def on_step_end(self, args, state, control, **_):
        if self.asked:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"


# What else decides the result, beside the recipe: names of TrainingArguments.
DECIDE = (
    "learning_rate", "num_train_epochs", "max_steps", "seed", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_grad_norm", "optim",
)  # fmt: skip


def insist_on_state() -> None:
    """New TrainingArguments take from accelerate what an earlier trainer stands on: say so."""
    if not AcceleratorState._shared_state:
        raise CourseError(
            "TrainingArguments 是新的，Trainer 还是旧的：请先运行 CourseTrainer 那一格。"
        )


def used(trainer) -> dict[str, float]:
    """With which settings the adapter was trained: the notebook's own numbers may not be the profile's."""
    lora, args = trainer.model.peft_config["default"], trainer.args
    return {
        "lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout,
        "learning_rate": args.learning_rate, "epochs": args.num_train_epochs,
    }  # fmt: skip


class CourseTrainer(transformers.Trainer):
    """transformers' Trainer, whose training nothing that happens on the way brings to nothing.

    Every :meth:`train` starts from the adapter as it was when the trainer was made, or goes on from
    a checkpoint exactly where that was written. A checkpoint is written beside its place and
    renamed when whole. Out of memory, training goes on from the last step with half the micro-batch
    and twice the accumulation, in the end with activation checkpointing. A loss that is no number
    ends it. And the last step of an epoch is filled up with rows that have no label, so that however
    a step is split, among processes too, all do the same.
    """

    def __init__(self, *, args, train_dataset, **others):
        args.ddp_find_unused_parameters = False  # the adapter's are all used
        args.disable_tqdm = True  # Progress says how far it is, a line at a time
        if args.save_strategy == "no":  # a trial: nothing of it belongs among the checkpoints
            self._place = tempfile.TemporaryDirectory()
            args.output_dir = self._place.name
        with writing(Path(args.output_dir)):
            super().__init__(args=args, train_dataset=_fill_last_step(train_dataset), **others)
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(Progress())
        self.stop = Stop()
        self.add_callback(self.stop)
        fresh = {
            name: p.detach().cpu().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad and not SHARDED
        }
        if getattr(self.model, "active_adapter", "") == "default":  # a second trainer's is trained
            fresh = self.model.__dict__.setdefault("fresh_adapter", fresh)
        self._fresh = fresh
        self.split = Split(args.per_device_train_batch_size, bool(args.gradient_checkpointing))
        self._beside, self._recipe = None, {}
        self._adapter = getattr(self.model, "active_adapter", "")

    def train(self, resume_from_checkpoint=None, **others):
        # accelerate takes a model that has been evaluated for prepared, and would not give it to
        # DDP: the processes would train apart, each on its share, without a word.
        self.model._is_accelerate_prepared = False
        insist_on_state()
        if self._adapter == "default":  # a ■ may have left another at work
            only_default(self.model)
        folder = Path(self.args.output_dir)
        if not self._keeps_to(folder, resume_from_checkpoint):
            resume_from_checkpoint = None
        while True:
            self.optimizer = self.lr_scheduler = None  # those of a training before know its steps
            if resume_from_checkpoint is None:
                with torch.no_grad():
                    for name, p in self.model.named_parameters():
                        if name in self._fresh:
                            p.copy_(self._fresh[name])
            try:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()  # the splits that were tried are no part of it
                with writing(folder):
                    result = super().train(resume_from_checkpoint=resume_from_checkpoint, **others)
                if self.stop.asked and self.state.global_step < self.state.max_steps:
                    kept = "已存好；再运行这一格就接着训练。"
                    if self.args.save_strategy == "no":
                        kept = "这是试一试，没有存；再运行这一格，从头再试。"
                    raise CourseError(f"停在第 {self.state.global_step} 步，{kept}")
                return result
            except KeyboardInterrupt:
                saved = max(map(_step, _checkpoints(folder)), default=0)
                raise CourseError(
                    f"马上停了，手上这一步没有算完；存好的是第 {saved} 步。再运行这一格，就从那里接着训练。"
                ) from None
            except (RuntimeError, MemoryError) as error:
                smaller = self.split.smaller()
                if not out_of_memory(error):
                    raise
                if smaller is None or PROCESSES > 1:  # the others wait for this one in vain
                    raise CourseError(TOO_BIG) from None
            finally:
                self.stop.give_back()
            # Not within `except`: the error's traceback holds on to the batch that was too big.
            print(f"第 {self.state.global_step + 1} 步内存不够，改成 {smaller}，从这一步接着训练。")
            resume_from_checkpoint = self._go_on_with(smaller)

    def _keeps_to(self, folder: Path, checkpoint) -> bool:
        """Note by what arguments is trained; False, and a word, if the checkpoints are by others."""
        if not (folder / "recipe.json").exists():
            return True
        self._recipe = read_json(folder / "recipe.json")
        now = {name: str(getattr(self.args, name)) for name in DECIDE}
        before = self._recipe.get("args", now)
        self._recipe["args"] = now
        self.accelerator.wait_for_everyone()
        same = before == now or not checkpoint
        moved = None if same else set_aside(folder)
        if self.is_world_process_zero():
            folder.mkdir(exist_ok=True)
            write_json(folder / "recipe.json", self._recipe)
        self.accelerator.wait_for_everyone()
        if moved:
            changed = "，".join(f"{n} {before[n]} → {now[n]}" for n in now if before[n] != now[n])
            print(
                f"不接着了：TrainingArguments 改过（{changed}），从头开始；以前的检查点改名为 {moved.name}。"
            )
        return same

    def save_model(self, output_dir=None, _internal_call=False):
        if self._beside is None and not _internal_call:  # for good
            if self.state.global_step < max(self.state.max_steps, 1):
                raise CourseError(
                    f"训练停在第 {self.state.global_step} 步，没有跑完，不存：请先把训练那一格运行完。"
                )
            only_default(self.model)
        super().save_model(output_dir, _internal_call)

    def evaluate(self, *args, **others):
        insist_on_state()
        return super().evaluate(*args, **others)

    def evaluation_loop(self, *args, **others):
        """The Trainer's, but the loss is the mean over all labels: its own is one over batches."""
        self._told = [0.0, 0]  # the sum of the losses of all labels, and how many
        output = super().evaluation_loop(*args, **others)
        told = torch.tensor(self._told, device=self.args.device)
        total, count = self.accelerator.reduce(told, reduction="sum").tolist()
        output.metrics[f"{others.get('metric_key_prefix', 'eval')}_loss"] = total / count
        return output

    def prediction_step(self, model, inputs, *args, **others):
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        count = int((labels != -100).sum())
        result = super().prediction_step(model, inputs, *args, **others)
        self._told[0] += result[0].item() * count
        self._told[1] += count
        return result

    def training_step(self, *args, **others):
        loss = super().training_step(*args, **others)
        if not torch.isfinite(loss):
            raise CourseError(
                f"第 {self.state.global_step + 1} 步的损失是 {loss.item()}，训练停下来，什么也没有覆盖。"
                f"多半是学习率 {self.args.learning_rate:g} 太大：回到 01 改小它（一般不超过 1e-2），再运行 03。"
                f"这一步用的是训练集的第 {'、'.join(map(str, self._rows_of_this_step()))} 条（从 0 数起），也看看它们。"
            )
        return loss

    def _rows_of_this_step(self) -> list[int]:
        sampler = DialogueSampler(self.train_dataset, self.args.seed)
        steps = len(self.train_dataset) // ROWS_PER_STEP
        sampler.set_epoch(self.state.global_step // steps)
        first = self.state.global_step % steps * ROWS_PER_STEP
        return sorted([*sampler][first : first + ROWS_PER_STEP])

    def _go_on_with(self, split: Split) -> str | None:
        """Change to `split`; returns a checkpoint of the last whole step, None before the first."""
        self.split = split
        self.model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        self.args.per_device_train_batch_size = split.micro_batch
        self.args.gradient_accumulation_steps = split.accumulation
        self._train_batch_size = self.state.train_batch_size = self.args.train_batch_size
        if split.checkpointing:
            checkpoint_activations(self.model)
        folder = Path(self.args.output_dir)
        if self._recipe:
            self._recipe["split"] = asdict(split)
            write_json(folder / "recipe.json", self._recipe)
        if self.state.global_step == 0:
            return None
        self._save_checkpoint(self.model, trial=None)
        return str(folder / f"checkpoint-{self.state.global_step}")

    def _get_train_sampler(self, *_):
        return DialogueSampler(self.train_dataset, self.args.seed)

    def _get_output_dir(self, trial):
        return self._beside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        self._beside = str(folder / "unfinished")
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if not self.is_world_process_zero():
            return
        name = f"checkpoint-{self.state.global_step}"
        if (folder / name).exists():  # a damaged one that was passed over
            shutil.rmtree(folder / name)
        (folder / "unfinished" / name).rename(folder / name)
        shutil.rmtree(folder / "unfinished")
        if self._recipe and not (folder / "recipe.json").exists():  # somebody tidied up
            write_json(folder / "recipe.json", self._recipe)
        if self.args.save_total_limit:
            # By their steps: a clock may go back.
            former = [c for c in _checkpoints(folder) if _step(c) <= self.state.global_step]
            for old in former[: -self.args.save_total_limit]:
                shutil.rmtree(old)


def _fill_last_step(rows):
    """`rows` and as many without a label as the last step lacks; neither loss nor gradient changes."""
    lacking = -len(rows) % ROWS_PER_STEP
    if not lacking:
        return rows
    one = {name: rows[0][name][:1] for name in rows[0] if name != "labels"} | {"labels": [-100]}
    if isinstance(rows, datasets.Dataset):
        filler = datasets.Dataset.from_list([one] * lacking, features=rows.features)
        return datasets.concatenate_datasets([rows, filler])
    return [*rows, *[one] * lacking]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _checkpoints(folder: Path) -> list[Path]:
    """Those in `folder`, the first step first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=_step)


def _plain(recipe: dict) -> dict:
    return json.loads(json.dumps(recipe, default=str))


def _whole_recipe(course: Course, recipe: dict) -> dict:
    """`recipe`, and of which model and which rows: they may have changed in place."""
    known = course.manifest.get("known", {})
    of = {name: known.get(name, {}).get("id") for name in ARTEFACTS["adapter"].of}
    return _plain(recipe | {"of": of})


def _unfinished(folder: Path, recipe: dict) -> dict | None:
    """What stands beside the checkpoints of a training by `recipe`, if its adapter was not saved.

    ``{"recipe": …, "split": …, "checkpoint": the last whole one or None, "damaged": […], "ended": bool}``
    """
    try:
        written = read_json(folder / "recipe.json")
        Split(**written["split"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if written.get("recipe") != recipe:
        return None
    found = _checkpoints(folder)
    whole = [path for path in found if _is_whole(path)]
    damaged = [path for path in found if path not in whole]
    ended, weights = False, "adapter_model.safetensors"
    if whole:
        state = read_json(whole[-1] / "trainer_state.json")
        ended = state["global_step"] >= state["max_steps"]
        saved = folder.parent / ARTEFACTS["adapter"].file / weights
        if ended and saved.exists() and filecmp.cmp(saved, whole[-1] / weights, shallow=False):
            return None
    last = whole[-1] if whole else None
    return written | {"checkpoint": last, "damaged": damaged, "ended": ended}


def resume_point(course: Course, recipe: dict, split: Split) -> Path | None:
    """The checkpoint from which this training can go on, or None to start afresh.

    `recipe` is everything that decides the result (arguments, data). It is kept beside the
    checkpoints; those of another recipe, or of a training whose adapter was saved, are renamed and
    stay on disk. A damaged checkpoint is passed over.
    """
    if "tokenized" in course.manifest.get("files", {}):
        course.path("tokenized")  # still what this kernel has read
    folder, recipe = course.run_dir / "checkpoints", _whole_recipe(course, recipe)
    with PartialState().main_process_first():  # it renames; the others only look
        unfinished = _unfinished(folder, recipe)
        if unfinished is None:
            with writing(folder):
                moved = set_aside(folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "recipe.json", {"recipe": recipe, "split": asdict(split)})
            if moved:
                print(f"以前的检查点改名为 {moved.name}，没有删除。")
            return None
        for path in unfinished["damaged"]:
            print(f"{path.name} 不完整（写到一半断了，或者文件坏了），跳过它。")
        checkpoint = unfinished["checkpoint"]
        if unfinished["ended"]:
            print(f"上次训练到了头，还没有保存：从 {checkpoint.name} 取回来，不用再训练。")
        elif checkpoint:
            print(f"从 {checkpoint.name} 接着训练。")
        return checkpoint


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = read_json(checkpoint / "trainer_state.json")
        if not all(type(state[name]) is int for name in ("global_step", "max_steps")):
            return False
        check_adapter(checkpoint)
        for name in ("optimizer.pt", "scheduler.pt"):
            if zipfile.ZipFile(checkpoint / name).testzip():
                return False
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        if not {"state", "param_groups"} <= optimizer.keys():
            return False
        states = list(checkpoint.glob("rng_state*.pth"))
        return bool(states) and not any(zipfile.ZipFile(path).testzip() for path in states)
    except Exception:  # whatever is wrong with it
        return False


def make_portable(adapter_dir: Path, base_name: str) -> None:
    """Make a saved adapter and tokenizer readable on another machine, by older versions too.

    - peft notes where the base model lay on this disk: its name is put there instead. What stands at
      peft's default is left out, so that an older peft does not stumble over fields it does not know;
      but for what vLLM asks for.
    - transformers 5 notes a tokenizer class that 4.x does not know, and not what the model takes.
    - The chat template would write today's date into every prompt, or think aloud: it gets what the
      training had (prompt.fixed_template).
    - The Trainer's own arguments, full of paths, are taken out.

    Raises CourseError where the adapter holds no tensors, or numbers that are none.
    """
    folder = Path(adapter_dir)
    check_adapter(folder)
    (folder / "training_args.bin").unlink(missing_ok=True)

    defaults = LoraConfig().to_dict()
    config = read_json(folder / "adapter_config.json")
    if config.get("init_lora_weights") == "gaussian":
        del config["init_lora_weights"]  # how it began says nothing any more
    kept = {
        name: value
        for name, value in config.items()
        if name in ("peft_type", "r", "lora_alpha", "target_modules")
        or (name != "peft_version" and value != defaults.get(name))
    }
    write_json(folder / "adapter_config.json", kept | {"base_model_name_or_path": base_name})

    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path)
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(path, tokenizer)

    template = fixed_template(transformers.AutoTokenizer.from_pretrained(folder))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
