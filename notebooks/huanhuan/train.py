"""Room 03: pack rows, fit the step into the memory, train through crashes, save for any machine."""

import gc
import json
import os
import random
import shutil
import time
import zipfile
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from huanhuan.course import (
    ROWS_PER_STEP,
    SHARDED,
    Course,
    CourseError,
    Profile,
    peak_memory_gib,
    write_json,
)
from huanhuan.prompt import DATE_STRING

GIB = 2**30
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # that train together; torchrun sets it

TOO_BIG = """训练放不进内存。可以这样做：
1. 关掉别的笔记本的内核（菜单 Kernel → Shut Down All Kernels），重新运行 03；
2. 对话很长的话，回到 01，用 Course.start(max_length=256) 截短；
3. NVIDIA 显卡：pip install bitsandbytes，把环境变量 HUANHUAN_PROFILE 设成 gpu-4bit，用 4 位权重训练；
4. 换一个小一些的模型，例如把 HUANHUAN_MODEL 设成 LLM-Research/Llama-3.2-1B-Instruct。"""


class SharedPrefixCollator:
    """Packs a micro-batch into one row in which tokens that rows begin with alike stand only once.

    All dialogues of the course begin with the same system prompt. In a causal model a token's state
    depends on nothing but the tokens before it, so that a common beginning needs to be computed
    only once: the rows form a tree, and every token sees its own ancestors. Loss and gradient are
    those of the padded batch (tests/test_train.py), at fewer positions, and only those that predict
    a label go through the head.

    The idea for pairs of answers to one prompt: Prefix Sharing, https://arxiv.org/abs/2410.20305.

    Args:
        dtype: of the attention mask. float32 suits everything; the model's own saves a conversion
            in every layer on a GPU.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """One batch for a causal model of transformers, from rows with `input_ids` and `labels`.

        A token is shared only where a row carries no label yet, and the token before a row's first
        label is always the row's own. Rows with nothing in common are packed all the same.

        Returns, with S positions of which n predict a label:
            input_ids, position_ids, labels: (1, S), int64. Positions count within each row; the
                model does not look at `labels`, but the Trainer asks for them and counts them.
            attention_mask: (1, 1, S, S), added to the attention scores: 0 to see, -inf not to. A
                boolean mask would do for sdpa; eager attention adds it as 0 and 1, without a word.
            logits_to_keep: (n,), int64: the positions that predict a label.
            shift_labels: (1, n), int64: the labels that they predict.
        """
        ids, labels, positions, spans = [], [], [], []
        tokens, path = [], []  # of the row before; path: where its tokens stand in the packed row
        for row in sorted(rows, key=lambda row: row["input_ids"]):  # the likest become neighbours
            before, tokens = tokens, row["input_ids"]
            unlabelled = next((i for i, x in enumerate(row["labels"]) if x != -100), len(tokens))
            pairs = zip(before, tokens[: max(unlabelled - 1, 0)], strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            start = len(ids)
            ids += tokens[shared:]
            labels += row["labels"][shared:]
            positions += range(shared, len(tokens))
            path = path[:shared] + list(range(start, len(ids)))
            spans.append((start, shared, path))

        longest, size = max(positions) + 1, len(ids)
        causal = torch.full((longest, longest), -torch.inf, dtype=self.dtype).triu(1)
        mask = torch.full((size, size), -torch.inf, dtype=self.dtype)
        for start, shared, path in spans:
            end = start + len(path) - shared
            mask[start:end, path] = causal[shared : len(path), : len(path)]

        labels = torch.tensor(labels)
        predicted = labels.clone()
        predicted[[start for start, _, _ in spans]] = -100  # nothing stands before a row's first
        where = (predicted != -100).nonzero().squeeze(1)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": mask[None, None],
            "labels": labels[None],
            "logits_to_keep": where - 1,
            "shift_labels": predicted[None, where],
        }


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


def estimate_memory(config, profile: Profile, rows, split: Split) -> dict[str, float]:
    """GiB that training needs at its fullest, part by part. Nothing is loaded.

    `config` is the model's; `rows` a Dataset with `input_ids` and `labels`.

    The activations are what autograd keeps of a Llama layer with LoRA and dropout at all seven
    linear maps (counted in tests/test_train.py): in float32, 18 tensors as wide as the hidden state
    and 5 as wide as the MLP; in 16 bits a part of them stays float32. One layer is added for what
    the backward pass itself needs.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    maps = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    in_maps, size = sum(m.weight.numel() for m in maps), getattr(torch, profile.dtype).itemsize
    # 4 bits, and 8 bits of scale for every 64 of them, which have scales themselves (nf4, double)
    map_size = 0.516 if profile.quantized else size
    weights = (model.num_parameters() - in_maps) * size + in_maps * map_size
    adapter = profile.lora_r * sum(m.in_features + m.out_features for m in maps)

    packed = SharedPrefixCollator()(_fullest(rows, split.micro_batch))
    tokens, labels = packed["input_ids"].numel(), packed["shift_labels"].numel()
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layer = 72 * hidden + 20 * wide if size == 4 else 52 * hidden + 12 * wide  # bytes a token
    kept = layers * hidden * size + layer if split.checkpointing else layers * layer
    if SHARDED:
        weights, adapter = weights / PROCESSES, adapter / PROCESSES
    return {
        "模型权重": weights / GIB,
        "适配器与优化器": adapter * 16 / GIB,  # value, gradient and Adam's two, all float32
        "中间结果": tokens * (kept + layer) / GIB,
        # scores, in float32 too where they are not yet; their log-softmax; the gradients of both
        "词表分数": labels * config.vocab_size * (12 if size == 4 else 16) / GIB,
    }


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


def _step_seconds(model, rows: list[dict], split: Split, profile: Profile) -> float:
    """One forward and backward pass over `rows` in micro-batches, timed."""
    dtype = getattr(torch, profile.dtype)
    collator = SharedPrefixCollator(dtype)
    start = time.perf_counter()
    for first in range(0, len(rows), split.micro_batch):
        batch = collator(rows[first : first + split.micro_batch])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        float(loss.detach())  # waits for the GPU
    return time.perf_counter() - start


def choose_split(course: Course, recipe: dict, model, rows, candidates: list[Split]) -> Split:
    """The fastest of the candidates on this machine; a training that was cut off keeps its own.

    Each takes a micro-batch as full as they come through once, to see that it fits, then 16 rows
    from all over the data, timed. Weights, gradients and random state stay as they were. Of several
    processes, all take what the first found. Raises CourseError where none fits.
    """
    unfinished = _unfinished(course.run_dir / "checkpoints", recipe)
    if unfinished:
        print("上次的训练还没有完，接着用它的分法。")
        return Split(**unfinished["split"])
    if SHARDED:  # a model that is to be cut into parts runs nowhere whole
        return candidates[0]
    typical = [rows[i] for i in range(0, len(rows), -(-len(rows) // ROWS_PER_STEP))]
    timed = []
    for split in candidates:
        if split.checkpointing:
            checkpoint_activations(model)
        try:
            with torch.random.fork_rng():
                _step_seconds(model, _fullest(rows, split.micro_batch), split, course.profile)
                seconds = _step_seconds(model, typical, split, course.profile)
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


class CourseTrainer(transformers.Trainer):
    """transformers' Trainer, whose training neither a crash nor a lack of memory brings to nothing.

    A checkpoint is written beside its place and renamed when whole. Out of memory, training goes on
    from the last step with half the micro-batch and twice the accumulation, in the end with
    activation checkpointing. And the last step of an epoch is filled up with rows that have no
    label, so that however a step is split, among processes too, all do the same.
    """

    def __init__(self, *, args, train_dataset, **others):
        args.ddp_find_unused_parameters = False  # the adapter's are all used
        super().__init__(args=args, train_dataset=_fill_last_step(train_dataset), **others)
        self.split = Split(args.per_device_train_batch_size, bool(args.gradient_checkpointing))
        self._beside = None

    def train(self, resume_from_checkpoint=None, **others):
        # accelerate takes a model that has been evaluated for prepared, and would not give it to
        # DDP: the processes would train apart, each on its share, without a word.
        self.model._is_accelerate_prepared = False
        while True:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **others)
            except (RuntimeError, MemoryError) as error:
                smaller = self.split.smaller()
                if not out_of_memory(error):
                    raise
                if smaller is None or PROCESSES > 1:  # the others wait for this one in vain
                    raise CourseError(TOO_BIG) from None
            # Not within `except`: the error's traceback holds on to the batch that was too big.
            print(f"第 {self.state.global_step + 1} 步内存不够，改成 {smaller}，从这一步接着训练。")
            resume_from_checkpoint = self._go_on_with(smaller)

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
        written = folder / "recipe.json"
        if written.exists():
            recipe = json.loads(written.read_text(encoding="utf-8"))["recipe"]
            _write_recipe(folder, recipe, split)
        if self.state.global_step == 0:
            return None
        self._save_checkpoint(self.model, trial=None)
        return str(folder / f"checkpoint-{self.state.global_step}")

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
        if self.args.save_total_limit:
            written = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
            for old in written[: -self.args.save_total_limit]:
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


def _plain(recipe: dict) -> dict:
    return json.loads(json.dumps(recipe, default=str))


def _write_recipe(folder: Path, recipe: dict, split: Split) -> None:
    content = {"recipe": _plain(recipe), "split": asdict(split)}
    write_json(folder / "recipe.json", content)


def _unfinished(folder: Path, recipe: dict) -> dict | None:
    """What stands beside the checkpoints of a training by `recipe`, if it was cut off.

    ``{"recipe": …, "split": …, "checkpoint": the last whole one or None, "damaged": […]}``
    """
    try:
        written = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if written.get("recipe") != _plain(recipe):
        return None
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if _is_whole(path)]
    damaged = [path for path in found if path not in whole]
    if whole:
        state = json.loads((whole[-1] / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] >= state["max_steps"]:
            return None
    return written | {"checkpoint": whole[-1] if whole else None, "damaged": damaged}


def resume_point(course: Course, recipe: dict, split: Split) -> Path | None:
    """The checkpoint from which this training can go on, or None to start afresh.

    `recipe` is everything that decides the result (arguments, data). It is kept beside the
    checkpoints; those of another recipe, or of a training that came to its end, are renamed and
    stay on disk. A damaged checkpoint is passed over.
    """
    folder = course.run_dir / "checkpoints"
    with PartialState().main_process_first():  # it renames; the others only look
        unfinished = _unfinished(folder, recipe)
        if unfinished is None:
            moved = course.set_aside(folder)
            if moved:
                print(f"以前的检查点改名为 {moved.name}，没有删除。")
            folder.mkdir(parents=True, exist_ok=True)
            _write_recipe(folder, recipe, split)
            return None
        for path in unfinished["damaged"]:
            print(f"{path.name} 不完整（写到一半断了，或者文件坏了），跳过它。")
        checkpoint = unfinished["checkpoint"]
        if checkpoint:
            print(f"从 {checkpoint.name} 接着训练。")
        return checkpoint


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
            file.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            if zipfile.ZipFile(checkpoint / name).testzip():
                return False
        states = list(checkpoint.glob("rng_state*.pth"))
        return bool(states) and not any(zipfile.ZipFile(path).testzip() for path in states)
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def make_portable(adapter_dir: Path, base_name: str) -> None:
    """Make a saved adapter and tokenizer readable on another machine, by older versions too.

    - peft notes where the base model lay on this disk: its name is put there instead. What stands at
      peft's default is left out, so that an older peft does not stumble over fields it does not know;
      but for what vLLM asks for.
    - transformers 5 notes a tokenizer class that 4.x does not know, and not what the model takes.
    - The chat template would write today's date into every prompt: it gets the training's.
    - The Trainer's own arguments, full of paths, are taken out.
    """
    folder = Path(adapter_dir)
    (folder / "training_args.bin").unlink(missing_ok=True)

    defaults = LoraConfig().to_dict()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kept = {
        name: value
        for name, value in config.items()
        if name in ("peft_type", "r", "lora_alpha", "target_modules")
        or (name != "peft_version" and value != defaults.get(name))
    }
    write_json(folder / "adapter_config.json", kept | {"base_model_name_or_path": base_name})

    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(path, tokenizer)

    template = folder / "chat_template.jinja"
    text, date = template.read_text(encoding="utf-8"), f'{{% set date_string = "{DATE_STRING}" %}}'
    if not text.startswith(date):
        template.write_text(date + text, encoding="utf-8")
