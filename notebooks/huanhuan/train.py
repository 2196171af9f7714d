"""Room 03: how long will it take, where can it go on, is what was saved what was trained?"""

import json
import time
import zipfile
from itertools import islice, takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from huanhuan.course import Course


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


def estimate_minutes(trainer, batches: int = 4) -> float:
    """Minutes that ``trainer.train()`` will take, from a few timed forward and backward passes.

    Leaves weights, gradients and random state as they were. Counts the training steps; the
    evaluations in between add a little.
    """
    args, model, seconds = trainer.args, trainer.model, []
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    if args.gradient_checkpointing:  # as train() will do: the passes must fit into the same memory
        model.gradient_checkpointing_enable()
    with torch.random.fork_rng():
        loader = trainer.get_train_dataloader()
        model.train()
        for batch in islice(loader, batches + 1):
            start = time.perf_counter()
            batch = {name: value.to(args.device) for name, value in batch.items()}
            with torch.autocast(args.device.type, dtype=dtype, enabled=args.fp16 or args.bf16):
                loss = model(**batch).loss
            loss.backward()
            float(loss.detach())  # waits for the GPU
            seconds.append(time.perf_counter() - start)
    model.zero_grad()
    seconds = seconds[1:] or seconds  # the first pass also warms up
    return sum(seconds) / len(seconds) * len(loader) * args.num_train_epochs / 60


def resume_point(course: Course, recipe: dict) -> Path | None:
    """The checkpoint from which this training can go on, or None to start afresh.

    `recipe` is everything that decides the result (arguments, data). It is kept beside the
    checkpoints; those of another recipe, or of a training that came to its end, are renamed and
    stay on disk. A checkpoint that was cut off while being written is passed over.
    """
    folder = course.run_dir / "checkpoints"
    written = folder / "recipe.json"
    recipe = json.loads(json.dumps(recipe, default=str))
    if written.exists() and json.loads(written.read_text(encoding="utf-8")) == recipe:
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        whole = [path for path in found if _is_whole(path)]
        if whole:
            state = json.loads((whole[-1] / "trainer_state.json").read_text(encoding="utf-8"))
            if state["global_step"] < state["max_steps"]:
                print(
                    f"上次训练停在第 {state['global_step']} / {state['max_steps']} 步，从 {whole[-1].name} 接着训练。"
                )
                return whole[-1]
    moved = course.set_aside(folder)
    if moved:
        print(f"以前的检查点改名为 {moved.name}，没有删除。")
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(recipe, ensure_ascii=False, indent=2), encoding="utf-8")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
            file.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    return all(
        zipfile.is_zipfile(checkpoint / name)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    )


def make_portable(adapter_dir: Path, base_name: str) -> None:
    """Make a saved adapter and tokenizer readable on another machine.

    peft notes where the base model lay on this disk; its name is put there instead. transformers 5
    notes a tokenizer class that 4.x does not know; the class that both know is put there.
    """
    for file, field, value in (
        ("adapter_config.json", "base_model_name_or_path", base_name),
        ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
    ):
        path = Path(adapter_dir) / file
        config = json.loads(path.read_text(encoding="utf-8")) | {field: value}
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
