"""The whole training on a GPU: Llama-3.2-3B's shape, random weights, the genuine tokenizer.

    python tests/benchmarks/whole_training.py --rows FILE [--steps N] [--only NAME…] [--out FILE.json]
    python tests/benchmarks/whole_training.py --hidden 256 --layers 2 --steps 2      # a trial on a CPU

Three epochs (702 steps on the tutorial's dataset) by every recipe that this machine can run:
seconds, peak memory, and achieved TFLOP/s against the matmul rate measured first. Needs what the
tests need; TRL and Liger take part where ``trl`` and ``liger_kernel`` are installed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import step
import torch
import transformers
from conftest import ROOT, genuine_tokenizer
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from huanhuan.course import machine, versions
from huanhuan.train import ROWS, SharedPrefixCollator, checkpoint_activations

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


@dataclass(frozen=True)
class Recipe:
    name: str
    micro_batch: int
    packing: str = "shared"  # or "padded", "bucketed", or "trl"
    checkpointing: bool = False
    trl: dict = field(default_factory=dict)
    compile: dict | None = None  # arguments of torch.compile, for every decoder layer
    liger: bool = False


def recipes() -> list[Recipe]:
    """The tutorial's first. Those that change the model for good stand last."""
    found = [
        Recipe("tutorial 4x4", 4, "padded", checkpointing=True),
        Recipe("padded 4x4", 4, "padded"),
    ]
    if importlib.util.find_spec("trl"):
        for micro in (4, 8, 16):
            split = f"{micro}x{16 // micro}"
            found.append(Recipe(f"TRL padded {split}", micro, "trl"))
            free = {"padding_free": True}
            found.append(Recipe(f"TRL padding-free {split}", micro, "trl", trl=free))
    found += [Recipe(f"ours {micro}x{16 // micro}", micro) for micro in (4, 8, 16)]
    if CUDA and importlib.util.find_spec("liger_kernel"):
        found.append(Recipe("ours 16x1 Liger", 16, liger=True))
    if CUDA:
        found.append(Recipe("ours 16x1 compile", 16, "bucketed", compile={}))
        graphs = {"mode": "reduce-overhead"}
        found.append(Recipe("ours 16x1 CUDA graphs", 16, "bucketed", compile=graphs))
    return found


def bucketed(rows: list[dict], multiple: int = 128) -> dict[str, torch.Tensor]:
    """A packed batch filled up to a multiple of so many positions: few shapes to compile for.

    A filler sees itself and nobody sees it.
    """
    batch = SharedPrefixCollator(DTYPE)(rows)
    size = batch["input_ids"].shape[1]
    more = -size % multiple
    for name, value in (("input_ids", 0), ("position_ids", 0), ("labels", -100)):
        batch[name] = torch.nn.functional.pad(batch[name], (0, more), value=value)
    mask = torch.full((size + more, size + more), -torch.inf, dtype=DTYPE)
    mask[:size, :size] = batch["attention_mask"][0, 0]
    filler = torch.arange(size, size + more)
    mask[filler, filler] = 0
    return batch | {"attention_mask": mask[None, None]}


def base_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """Llama-3.2-3B where hidden is 3072 and layers 28."""
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": max(hidden // 384, 1)}
    with torch.device(DEVICE):
        return step.llama(hidden, layers, 128256, head_dim=128, **heads).to(DTYPE)


def matmul_rate() -> float:
    """FLOP/s of a large square product in the training's dtype."""
    size = 8192 if CUDA else 1024
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    for repeats in (3, 20):
        start = time.perf_counter()
        for _ in range(repeats):
            b = a @ a
        float(b[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)


class Watch(TrainerCallback):
    """When the training began and when every step ended."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *_, **__):
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def train(recipe: Recipe, base, tokenizer, rows: Dataset, steps: int, folder: str) -> dict:
    """A whole training by `recipe`; the base model keeps its weights."""
    torch.manual_seed(0)
    model = step.with_lora(base)
    model.set_attn_implementation(ROWS if recipe.packing == "shared" else "sdpa")
    if recipe.checkpointing:
        checkpoint_activations(model)
    if recipe.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        kernels = {"rope": True, "rms_norm": True, "swiglu": True}
        off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel_to_llama(**kernels, **off, model=base)
    if recipe.compile is not None:
        torch._dynamo.reset()
        for layer in base.model.layers:
            layer.compile(dynamic=False, **recipe.compile)
    common = {
        "output_dir": folder, "num_train_epochs": 3, "max_steps": steps, "seed": 0,
        "per_device_train_batch_size": recipe.micro_batch, "learning_rate": 1e-4,
        "gradient_accumulation_steps": 16 // recipe.micro_batch, "bf16": CUDA, "use_cpu": not CUDA,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "remove_unused_columns": False, "logging_nan_inf_filter": False,
    }  # fmt: skip
    watch = Watch()
    if recipe.packing == "trl":
        from trl import SFTConfig, SFTTrainer

        # its default is True: TRL's best is without, where the memory allows it
        arguments = SFTConfig(**common, max_length=None, gradient_checkpointing=False, **recipe.trl)
        trainer = SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]
        )
    else:
        collator = {
            "padded": DataCollatorForSeq2Seq(tokenizer), "bucketed": bucketed,
            "shared": SharedPrefixCollator(DTYPE, dense=False),
        }[recipe.packing]  # fmt: skip
        trainer = Trainer(model, TrainingArguments(**common), collator, rows, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    losses = step.watch_losses(trainer)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if CUDA:
        torch.cuda.synchronize()
    passes = torch.stack([loss.detach().float().cpu() for loss in losses])
    per_step = 16 // recipe.micro_batch
    result = {
        "seconds": time.perf_counter() - watch.ends[0],
        "first_step_seconds": watch.ends[1] - watch.ends[0],  # with compiling, where it compiles
        "steps": trainer.state.global_step,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        "losses": [float(part.sum()) for part in passes.split(per_step)],
    }
    # the base goes on to the next recipe: as it was
    for layer in base.model.layers:
        layer._compiled_call_impl = None
        layer.gradient_checkpointing = False
    if recipe.checkpointing:
        base.disable_input_require_grads()
    model.unload()
    return result


def useful_flop(base, rows: Dataset, steps: int, epochs: int = 3) -> float:
    """FLOP of LoRA's forward and backward pass over every token once, prefix included: 4 N a token.

    What a recipe recomputes, pads or shares is its own affair: the same numerator for all.
    """
    tokens = sum(len(ids) for ids in rows["input_ids"]) * epochs
    whole = -(-len(rows) // 16) * epochs
    weights = sum(p.numel() for p in base.model.layers.parameters())
    return 4 * weights * tokens * (steps / whole if steps > 0 else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROOT / "data" / "huanhuan_sample.json")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=-1, help="of every recipe; -1: three epochs")
    parser.add_argument("--only", nargs="+", help="recipes, by the beginning of their names")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")

    tokenizer = genuine_tokenizer()
    rows = Dataset.from_list(step.tokenised(asked.rows, tokenizer))
    base, rate = base_model(asked.hidden, asked.layers), matmul_rate()
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}: {rate / 1e12:.1f} TFLOP/s in {DTYPE}; {len(rows)} rows")
    flop = useful_flop(base, rows, asked.steps)
    print(f"{'recipe':<26}{'s':>9}{'times':>7}{'peak GiB':>10}{'TFLOP/s':>9}{'of peak':>9}  Δloss")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes():
            if asked.only and not recipe.name.startswith(tuple(asked.only)):
                continue
            try:
                one = train(recipe, base, tokenizer, rows, asked.steps, folder)
            except torch.OutOfMemoryError:
                print(f"{recipe.name:<26} out of memory")
                continue
            found[recipe.name] = one
            first = next(iter(found.values()))
            one["tflops"] = flop / one["seconds"] / 1e12
            pairs = zip(one["losses"], first["losses"], strict=True)
            one["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
            print(
                f"{recipe.name:<26}{one['seconds']:9.1f}{first['seconds'] / one['seconds']:7.2f}"
                f"{one['peak_memory_gib'] or float('nan'):10.2f}{one['tflops']:9.2f}"
                f"{one['tflops'] * 1e12 / rate:9.1%}  {one['largest_loss_difference']:.1e}",
                flush=True,
            )
    if asked.out:
        facts = {
            "machine": machine(), "versions": versions(), "dtype": str(DTYPE), "rows": len(rows),
            "hidden": asked.hidden, "layers": asked.layers, "matmul_flops": rate, "recipes": found,
        }  # fmt: skip
        for package in ("trl", "liger_kernel"):
            if importlib.util.find_spec(package):
                facts["versions"][package] = importlib.metadata.version(package)
        asked.out.write_text(json.dumps(facts, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
