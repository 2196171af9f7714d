"""One optimizer step of 16 dialogues, by several recipes: seconds, and proof that they do the same.

    python tests/benchmarks/step.py [--wide] [--turns] [--rows FILE] [--rounds N] [--only NAME…]
                                    [--llamafactory PYTHON] [--out FILE.json]

The model has random weights, and 8 of Llama-3.2-3B's own layers and its own head (`--wide`: about
7 GB of memory, minutes a step), or all 28 layers and a head as large, next to a layer, at about a
twelfth of the width, which is quick, and overstates all that is no product of matrices. The rows are
real dialogues, tokenised by the genuine Llama 3 tokenizer. Every round draws 16 of them, and every
recipe takes the Trainer one step further with an adapter of its own; the recipes take turns, so that
whatever else this machine does hits them all. Dropout is 0: the losses of a round must agree to 4
decimals.

With `--turns` a step is four conversations of four answers, about 600 tokens each: for the others
four rows with a loss on every answer, for ours a row for each answer, with what was said before it.

Needs what the tests need. TRL's SFTTrainer takes part where ``trl`` is installed, LLaMA-Factory
from an environment of its own (see llama_factory.py).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import transformers
from conftest import ROOT, genuine_tokenizer, notebook_process_func
from datasets import Dataset, DatasetDict
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from huanhuan.course import machine, versions
from huanhuan.reader import load_rows
from huanhuan.train import ROWS, SharedPrefixCollator

ROWS_PER_STEP = 16
TURNS, TURN_TOKENS = 4, 140  # of a conversation; at least so many a turn
HIDDEN = 264  # the multiple of 24 next to 256; transformers wants hidden / heads to be whole
VOCAB = round(128256 * HIDDEN / 3072)
WIDE = 128256  # the vocabulary of the 3B itself


def llama(hidden: int, layers: int, vocabulary: int, **others) -> LlamaForCausalLM:
    """Llama-3.2-3B's proportions at that width, with random weights: the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8192 // 3072,
        num_hidden_layers=layers, rope_theta=500000.0, rms_norm_eps=1e-5,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, use_cache=False, **others,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_lora(model: LlamaForCausalLM) -> PeftModel:
    """The course's adapter on `model`, but for dropout, which is 0."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, r=8, lora_alpha=32, lora_dropout=0.0
    )
    return get_peft_model(model, lora)


def proxy(wide: bool = False) -> PeftModel:
    """The model of this benchmark, in float32."""
    if wide:
        return with_lora(llama(3072, 8, WIDE, num_attention_heads=24, num_key_value_heads=8))
    return with_lora(llama(HIDDEN, 28, VOCAB, num_attention_heads=3, num_key_value_heads=1))


def tokenised(file: Path, tokenizer) -> list[dict]:
    """The dataset's rows as notebook 02 makes them."""
    process = notebook_process_func(tokenizer, 384)
    rows = map(process, load_rows(file).to_dict("records"))
    return [row for row in rows if len(row["input_ids"]) <= 384]


def folded(rows: list[dict], vocabulary: int) -> list[dict]:
    """`rows`, every id folded into a vocabulary: what they have in common they still have."""
    for row in rows:
        row["input_ids"] = [i % vocabulary for i in row["input_ids"]]
        row["labels"] = [i if i == -100 else i % vocabulary for i in row["labels"]]
    return rows


def dialogues(file: Path, vocabulary: int = VOCAB) -> list[dict]:
    """The dataset's rows, for a model of that vocabulary."""
    return folded(tokenised(file, genuine_tokenizer()), vocabulary)


def conversations(file: Path, vocabulary: int) -> list[list[dict]]:
    """For every conversation made of the dataset's rows, what notebook 02 makes of its answers."""
    tokenizer = genuine_tokenizer()
    process, found, turns, turn = notebook_process_func(tokenizer, 2048), [], [], ["", ""]
    for row in load_rows(file).to_dict("records"):
        turn = [
            f"{one}{two}"
            for one, two in zip(turn, (row["instruction"], row["output"]), strict=True)
        ]
        if len(tokenizer.encode("".join(turn))) >= TURN_TOKENS:
            turns, turn = [*turns, turn], ["", ""]
        if len(turns) == TURNS:
            asked = [
                {"instruction": question, "input": "", "output": answer, "history": turns[:place]}
                for place, (question, answer) in enumerate(turns)
            ]
            found.append(folded([*map(process, asked)], vocabulary))
            turns = []
    return found


def whole(conversation: list[dict]) -> dict:
    """One row with a loss on every answer, out of the rows of a conversation."""
    ids = conversation[-1]["input_ids"]
    labels = [-100] * len(ids)
    for row in conversation:
        if row["input_ids"] != ids[: len(row["input_ids"])]:
            raise ValueError("the turns of a conversation do not begin alike")
        for place, label in enumerate(row["labels"]):
            labels[place] = label if label != -100 else labels[place]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


# Pads the batches, no more; its ids are within the proxy's vocabulary.
PADDER = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama")


@dataclass(frozen=True)
class Recipe:
    """How the rows of a step become one: passes of micro_batch rows each."""

    name: str
    micro_batch: int
    collator: Callable | None = None
    checkpointing: bool = False
    trl: dict | None = None  # arguments of SFTConfig; then SFTTrainer brings its own collator
    llama_factory: bool = False


def recipes(llama_factory: bool, turns: bool = False) -> list[Recipe]:
    """The tutorial's first: the others are compared with it."""
    padded, shared = DataCollatorForSeq2Seq(PADDER), SharedPrefixCollator(dense=False)
    splits = [(micro, f"{micro}x{ROWS_PER_STEP // micro}") for micro in (2, 4, 8, 16)]
    ours = [Recipe(f"ours {name}", micro, shared) for micro, name in splits]
    if turns:  # theirs are whole conversations
        splits = [(micro, f"{micro}x{TURNS // micro}") for micro in (1, 2, 4)]
    fewest, name = (1, "1x4") if turns else (4, "4x4")
    found = [
        Recipe(f"tutorial {name}", fewest, padded, checkpointing=True),
        Recipe(f"no checkpointing {name}", fewest, padded),
        *ours,
    ]
    if importlib.util.find_spec("trl"):
        for kind, arguments in (("padded", {}), ("padding-free", {"padding_free": True})):
            found += [Recipe(f"TRL {kind} {name}", micro, trl=arguments) for micro, name in splits]
    if llama_factory:
        found += [
            Recipe(f"LLaMA-Factory {name}", micro, llama_factory=True) for micro, name in splits[:3]
        ]
    return found


def watch_losses(trainer: Trainer) -> list[torch.Tensor]:
    """A list that fills with the loss of every micro-batch as `trainer` trains."""
    losses, one = [], trainer.training_step

    def watched(*args, **kwargs):
        losses.append(one(*args, **kwargs))
        return losses[-1]

    trainer.training_step = watched
    return losses


class Clock(TrainerCallback):
    """Seconds from the first look at the data to the end of the step, collating included."""

    def on_epoch_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.start


def step(recipe: Recipe, model, rows: list[dict], folder: str) -> tuple[float, float]:
    """Train `model` one step on `rows`, all of them: seconds, and the loss of the step."""
    common = {
        "output_dir": folder, "max_steps": 1, "per_device_train_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": len(rows) // recipe.micro_batch, "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "gradient_checkpointing": recipe.checkpointing,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "remove_unused_columns": False, "seed": 0,
    }  # fmt: skip
    clock = Clock()
    if recipe.checkpointing:
        model.enable_input_require_grads()
    ours = isinstance(recipe.collator, SharedPrefixCollator)
    model.set_attn_implementation(ROWS if ours else "sdpa")
    if recipe.trl is None:
        trainer = Trainer(
            model, TrainingArguments(**common), recipe.collator, rows, callbacks=[clock]
        )
    else:
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model, SFTConfig(**common, bf16=False, max_length=None, **recipe.trl),
            train_dataset=Dataset.from_list(rows), processing_class=PADDER, callbacks=[clock],
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    losses = watch_losses(trainer)
    trainer.train()
    return clock.seconds, float(sum(losses))


class LlamaFactory:
    """The server of llama_factory.py, and the folders through which it gets models and rows."""

    def __init__(self, python: Path, folder: str, recipes: list[Recipe], wide: bool):
        self.folder, model = Path(folder), proxy(wide)
        for recipe in recipes:
            model.save_pretrained(self.folder / recipe.name)
        model.unload().save_pretrained(self.folder / "model")
        PADDER.save_pretrained(self.folder / "model")
        command = [str(python), str(Path(__file__).with_name("llama_factory.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def step(self, recipe: Recipe, rows: list[dict]) -> tuple[float, float]:
        DatasetDict(train=Dataset.from_list(rows)).save_to_disk(self.folder / "rows")
        asked = {
            "micro_batch": recipe.micro_batch, "passes": len(rows) // recipe.micro_batch,
            "rows": str(self.folder / "rows"),
            "model": str(self.folder / "model"), "adapter": str(self.folder / recipe.name),
        }  # fmt: skip
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], answer["loss"]


def measure(
    recipes: list[Recipe], rows: list, rounds: int, python: Path | None, wide: bool = False
) -> dict[str, dict[str, list]]:
    """`rounds` steps of every recipe, in turns, after one to warm up that is not counted.

    `rows` are rows, or conversations: lists of rows.
    """
    model = proxy(wide)  # one for all: each recipe brings its own adapter
    adapters = {recipe.name: get_peft_model_state_dict(model) for recipe in recipes}
    adapters = {name: {k: x.clone() for k, x in one.items()} for name, one in adapters.items()}
    found = {recipe.name: {"seconds": [], "losses": []} for recipe in recipes}
    draw, turns = random.Random(0), isinstance(rows[0], list)
    with tempfile.TemporaryDirectory() as folder:
        others = [recipe for recipe in recipes if recipe.llama_factory]
        server = LlamaFactory(python, folder, others, wide) if others else None
        for round in range(rounds + 1):
            drawn = draw.sample(rows, ROWS_PER_STEP // TURNS if turns else ROWS_PER_STEP)
            theirs = [whole(one) for one in drawn] if turns else drawn
            tokens = sum(len(row["input_ids"]) for row in theirs)
            print(f"round {round}: {tokens} tokens", "(warming up)" if round == 0 else "")
            for recipe in recipes:
                ours = isinstance(recipe.collator, SharedPrefixCollator)
                batch = [row for one in drawn for row in one] if turns and ours else theirs
                if recipe.llama_factory:
                    seconds, loss = server.step(recipe, batch)
                else:
                    set_peft_model_state_dict(model, adapters[recipe.name])
                    seconds, loss = step(recipe, model, batch, folder)
                    trained = get_peft_model_state_dict(model)
                    adapters[recipe.name] = {name: x.clone() for name, x in trained.items()}
                print(f"    {recipe.name:<24}{seconds:8.3f} s   loss {loss:.6f}", flush=True)
                if round:
                    found[recipe.name]["seconds"].append(seconds)
                    found[recipe.name]["losses"].append(loss)
        if server:
            server.process.stdin.close()
            server.process.wait()
    return found


def matmul_rate(wide: bool) -> float:
    """TFLOP/s of this machine on the product that a step has most of: 2,048 tokens through an MLP."""
    width = 3072 if wide else HIDDEN
    tokens, weights = torch.randn(2048, width), torch.randn(width, width * 8192 // 3072)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tokens @ weights
        seconds.append(time.perf_counter() - start)
    return 2 * tokens.numel() * weights.shape[1] / statistics.median(seconds) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true", help="layers of the 3B's own shape")
    parser.add_argument("--turns", action="store_true", help="conversations of four answers")
    parser.add_argument("--rows", type=Path, default=ROOT / "data" / "huanhuan_sample.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="recipes, by the beginning of their names")
    parser.add_argument("--llamafactory", type=Path, help="the python that has it installed")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    chosen = [
        r
        for r in recipes(bool(asked.llamafactory), asked.turns)
        if not asked.only or r.name.startswith(tuple(asked.only))
    ]
    vocabulary = WIDE if asked.wide else VOCAB
    rows = (conversations if asked.turns else dialogues)(asked.rows, vocabulary)
    rate = matmul_rate(asked.wide)
    print(f"this machine multiplies matrices at {rate:.3f} TFLOP/s")
    found = measure(chosen, rows, asked.rounds, asked.llamafactory, asked.wide)

    base = statistics.median(found[chosen[0].name]["seconds"])
    print(f"\n{'recipe':<24}{'median s':>10}{'min':>8}{'max':>8}   times faster than the first")
    for name, result in found.items():
        seconds = result["seconds"]
        result["median_seconds"] = statistics.median(seconds)
        result["times_faster"] = base / result["median_seconds"]
        print(
            f"{name:<24}{result['median_seconds']:10.3f}{min(seconds):8.3f}{max(seconds):8.3f}"
            f"{result['times_faster']:8.2f}"
        )
    losses = [result["losses"] for result in found.values()]
    apart = max(max(same) - min(same) for same in zip(*losses, strict=True))
    print(f"largest difference of a loss between recipes: {apart:.2e}")
    if asked.out:
        facts = {
            "machine": machine(), "versions": versions(), "threads": torch.get_num_threads(),
            "rows": asked.rows.name, "hidden": 3072 if asked.wide else HIDDEN,
            "vocabulary": vocabulary, "turns": asked.turns, "matmul_tflops": rate,
            "largest_loss_difference": apart, "recipes": found,
        }  # fmt: skip
        if importlib.util.find_spec("trl"):
            facts["versions"]["trl"] = importlib.metadata.version("trl")
        asked.out.write_text(json.dumps(facts, ensure_ascii=False, indent=2), encoding="utf-8")
    if apart > 5e-5:
        sys.exit("The recipes do not do the same: their losses differ in the fourth decimal.")


if __name__ == "__main__":
    main()
