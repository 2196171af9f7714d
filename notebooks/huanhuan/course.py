"""The ground floor: the profile that fits this machine, and what one notebook hands the next.

Everything a run leaves behind lies in one directory, ``HUANHUAN_OUTPUT`` or
``notebooks/output/<profile>``, and is listed in its ``manifest.json``. There is one way to make a
thing (:meth:`Course.making`) and one to take it (:meth:`Course.path`), in the spirit of make: beside
each lies a record of what it was made of, and what no longer holds is named, not used.
"""

import contextlib
import errno
import filecmp
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import reprlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError, safe_open

from huanhuan import DATA, NOTEBOOKS, CourseError, read_json
from huanhuan.persona import PERSONA, SYSTEM_PROMPT


@dataclass(frozen=True)
class Artefact:
    """What one notebook makes and a later one takes."""

    title: str
    made_by: str
    file: str = ""  # its name in the run directory; none: it was brought from elsewhere
    of: tuple[str, ...] = ()  # the artefacts that it is made of
    settings: tuple[str, ...] = ()  # the fields of Profile that decide it


ARTEFACTS = {
    "data": Artefact("数据集", "01_setup"),
    "model": Artefact("模型", "01_setup"),
    "tokenized": Artefact(
        "处理好的数据", "02_preprocess", "tokenized", ("data", "model"), ("max_length", "max_rows")
    ),
    "adapter": Artefact(
        "适配器", "03_train_lora", "llama3_lora", ("model", "tokenized"),
        ("quantized", "dtype", "epochs", "learning_rate", "lora_r", "lora_alpha", "lora_dropout"),
    ),
    "answers": Artefact("答卷", "04_infer", "answers.json", ("model", "tokenized", "adapter")),
    "pack": Artefact("压缩包", "04_infer", "llama3_lora.zip", ("adapter",)),
}  # fmt: skip
HANDED_ON = ("files", "known", "notebooks")  # the parts of the manifest that all add to
RECORD, RECORDED = "made.json", ("of", "settings", "results", "versions")
SAMPLED = 2**28  # bytes: of a larger file the beginning, the middle and the end are hashed

# One process uses one GPU. Given several, the Trainer would cut every batch into parts for them, and
# a packed batch cannot be cut. A launcher (torchrun) hands out the GPUs itself.
LAUNCHED = "LOCAL_RANK" in os.environ
# How many processes train together, and which of them this is.
PROCESSES = int(os.environ.get("WORLD_SIZE", 1)) if LAUNCHED else 1
RANK = int(os.environ.get("RANK", 0)) if LAUNCHED else 0
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # a model cut into parts, one a process
if not LAUNCHED:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "modelscope")


@dataclass(frozen=True)
class Profile:
    """What differs between machines, as data. The tutorial's values unless a comment says why not."""

    name: str
    model: str  # a hub id or a local folder
    device: str  # "cpu", "cuda" or "mps"
    dtype: str  # of the frozen weights; the adapter is always float32
    revision: str = "master"
    quantized: bool = False  # the frozen weights in 4 bits instead (bitsandbytes)
    max_length: int = 384  # tokens
    max_rows: int | None = None  # of the training rows, the first so many; None: all
    micro_batch: int | None = None  # rows a forward pass, of ROWS_PER_STEP; None: 03 measures
    epochs: int = 3
    learning_rate: float = 1e-4
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    # The tutorial's True costs a third to a half more time. 03 turns it on where memory asks for it.
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    # The tutorial's 100 or more may be all that a free instance lives for.
    save_steps: int = 25


# Rows between two updates of the adapter, whatever the machine, the micro-batch or the number of GPUs.
ROWS_PER_STEP = 16

_LLAMA = "LLM-Research/Llama-3.2-3B-Instruct"
_QWEN = "Qwen/Qwen2.5-{}-Instruct"

PROFILES = {
    # 1e-4 hardly moves a model a thousand times smaller: a rate of its own. The micro-batch is the
    # fastest of tests/benchmarks/step.py, and fixed: a class gets the same figures on every laptop.
    "cpu-tiny": Profile(
        "cpu-tiny", str(DATA / "tiny_llama"), "cpu", "float32", micro_batch=16, epochs=2, learning_rate=1.2e-3
    ),
    # Small real models learn nothing of the data at the 3B's rate (tests/benchmarks/rates.py).
    "cpu-small": Profile(
        "cpu-small", _QWEN.format("0.5B"), "cpu", "float32", epochs=2, learning_rate=5e-4
    ),
    "mac": Profile("mac", _QWEN.format("1.5B"), "mps", "bfloat16", learning_rate=5e-4),
    "gpu-4bit": Profile("gpu-4bit", _LLAMA, "cuda", "bfloat16", quantized=True),
    "gpu-fp16": Profile("gpu-fp16", _LLAMA, "cuda", "float16"),
    "gpu-bf16": Profile("gpu-bf16", _LLAMA, "cuda", "bfloat16"),
}  # fmt: skip

# What 03 estimates for the real dataset, a row at a time (in 4 bits: with checkpointing), and a margin.
GPU_MEMORY_GIB, GPU_MEMORY_4BIT_GIB = 9.5, 3.9
SMALL_MEMORY_GIB, MAC_MEMORY_GIB = 8, 16  # for a real model of 0.5B; for one of 1.5B

CPU_ONLY_TORCH = (
    "这台机器有 NVIDIA 显卡，装的却是 CPU 版的 torch，用不上它。换成带 CUDA 的：在 Linux 上运行 "
    "pip install --upgrade --force-reinstall torch，再重启内核（Windows 请用 PyTorch 官网按显卡给出的那条命令）"
)


# (least, most) of the settings that are numbers.
LIMITS = {
    "max_length": (64, 131072), "max_rows": (2, 10**9),
    "epochs": (1, 1000), "learning_rate": (1e-9, 1e9), "lora_r": (1, 1024),
    "lora_alpha": (1, 65536), "lora_dropout": (0, 0.99), "logging_steps": (1, 10**6),
    "save_steps": (1, 10**6),
}  # fmt: skip
CHOICES = {
    "device": ("cpu", "cuda", "mps"), "dtype": ("float32", "float16", "bfloat16"),
    "micro_batch": (1, 2, 4, 8, 16),
}  # fmt: skip


_SETTINGS = {
    f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(Profile)
}


def _check_settings(given: dict) -> None:
    """Raises CourseError for a setting that Profile does not have, or a value that cannot be."""
    known = _SETTINGS
    if unknown := sorted(map(str, given.keys() - known.keys())):
        raise CourseError(
            f"档位里没有 {'、'.join(unknown)} 这一项，可以改的有：{'、'.join(known)}。"
        )
    kinds = {"int": int, "float": int | float, "bool": bool, "str": str}
    for name, value in given.items():
        optional, kind = "None" in known[name], known[name].split(" ")[0]
        if value is None and optional:
            continue
        right = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
        least, most = LIMITS.get(name, (None, None))
        if right and least is not None:
            right = least <= value <= most  # NaN is within nothing
        choices = CHOICES.get(name)
        right = right and (choices is None or value in choices)
        if not right or (kind == "str" and not value.strip()):
            wanted = {"int": "整数", "float": "数", "bool": "True 或 False", "str": "文字"}[kind]
            wanted += f"，从 {least:g} 到 {most:g}" if least is not None else ""
            wanted = f"{'、'.join(map(str, choices))} 里的一个" if choices else wanted
            try:
                written = reprlib.repr(value)
            except ValueError:  # Python does not write out a number of thousands of digits
                written = "这么长的数"
            raise CourseError(
                f"{name}={written} 不行：要写{wanted}。请改 Course.start(...) 或角色文件里的 profile。"
            )


def idle_gpu() -> bool:
    """Whether there is an NVIDIA card that this torch, built without CUDA, cannot use."""
    import torch

    built_for = torch.version.cuda or torch.version.hip
    return built_for is None and shutil.which("nvidia-smi") is not None


def gpu_name() -> str | None:
    """The accelerator in words, None where there is none: a card's name, or torch's word for it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name() + "（ROCm）" * (torch.version.hip is not None)
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6 and later
    found = accelerator and accelerator.is_available() and accelerator.current_accelerator()
    return found.type if found else None


def choose_profile() -> tuple[str, str]:
    """Name of the profile that fits this machine, and the reason in Chinese."""
    import torch

    asked = os.environ.get("HUANHUAN_PROFILE")
    if asked:
        if asked not in PROFILES:
            raise CourseError(
                f"环境变量 HUANHUAN_PROFILE={asked} 不认识，请改成其中之一：{'、'.join(PROFILES)}。"
            )
        if not _is_there(PROFILES[asked].device):
            why = CPU_ONLY_TORCH if idle_gpu() else "这台机器上 PyTorch 找不到它要用的 GPU"
            raise CourseError(
                f"HUANHUAN_PROFILE={asked} 在这里用不了：{why}。没有 GPU 请用 cpu-tiny 或 cpu-small。"
            )
        return asked, "环境变量 HUANHUAN_PROFILE 指定"
    if torch.cuda.is_available():
        return _gpu_profile()
    if _has_mps() and _memory_gib() >= SMALL_MEMORY_GIB:
        return "mac", f"Apple Silicon，{_memory_gib():.0f} GiB 内存，用 mps"
    reason = CPU_ONLY_TORCH if idle_gpu() else "没有找到可用的 GPU"
    if os.environ.get("HUANHUAN_MODEL"):
        return "cpu-small", f"{reason}，在 CPU 上用 HUANHUAN_MODEL 指定的模型"
    return "cpu-tiny", f"{reason}，用 CPU 跑小模型"


def _is_there(device: str) -> bool:
    import torch

    return {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}[device]


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def _memory_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / 2**30


def _gpu_profile() -> tuple[str, str]:
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    gpu = gpu_name()
    if memory < GPU_MEMORY_GIB:
        lacks = f"{gpu} 的显存 {memory:.1f} GiB 不足 {GPU_MEMORY_GIB} GiB，放不下 16 位的 3B"
        if memory < GPU_MEMORY_4BIT_GIB:
            return "cpu-tiny", f"{lacks}，用小模型"
        if importlib.util.find_spec("bitsandbytes"):
            return "gpu-4bit", f"{lacks}，用 4 位权重"
        return (
            "cpu-tiny",
            f"{lacks}，用小模型；先运行 pip install bitsandbytes 再来，就可以用 4 位权重训练 3B",
        )
    if _native_bf16():
        return "gpu-bf16", f"{gpu}（{memory:.1f} GiB）原生支持 bfloat16"
    return "gpu-fp16", f"{gpu}（{memory:.1f} GiB）没有原生的 bfloat16，用 float16"


def _native_bf16() -> bool:
    """Not torch.cuda.is_bf16_supported() on NVIDIA: it says True on a T4, which only emulates bf16."""
    import torch

    if torch.version.hip is not None:
        return torch.cuda.is_bf16_supported()
    return torch.cuda.get_device_capability()[0] >= 8  # compute capability


def _for_this_machine(profile: Profile, given: dict) -> Profile:
    """`profile` with what depends on the very machine and model, but for what was `given`."""
    if profile.name == "cpu-tiny" and given.get("model", profile.model) != profile.model:
        # The rate and the micro-batch are the toy's: they would ruin a real model, without a word.
        profile = replace(PROFILES["cpu-small"], name="cpu-tiny")
    if profile.device == "mps":
        if _memory_gib() < MAC_MEMORY_GIB:
            profile = replace(profile, model=_QWEN.format("0.5B"))
        if not _computes_bf16("mps"):
            profile = replace(profile, dtype="float32")
    if profile.quantized and profile.device == "cuda" and not _native_bf16():
        profile = replace(profile, dtype="float16")
    return replace(profile, **given)


def _computes_bf16(device: str) -> bool:
    import torch

    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((ones @ ones == 2).all())
    except (RuntimeError, TypeError):
        return False


def set_aside(path: Path) -> Path | None:
    """Give a file or folder of an earlier run a new name, so that nothing is overwritten.

    Returns the new path, or None where there was nothing to move.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if RANK != 0 or not os.path.lexists(path) or empty:
        return None
    stamp = datetime.fromtimestamp(path.lstat().st_mtime).strftime("%Y%m%d-%H%M%S")
    count, moved = 1, path.with_name(f"{path.stem}-{stamp}{path.suffix}")
    while os.path.lexists(moved):
        count += 1
        moved = path.with_name(f"{path.stem}-{stamp}-{count}{path.suffix}")
    return path.rename(moved)


class Course:
    """One run of the course: its profile, its directory and its manifest.

    Made by :meth:`start` in notebook 01 and by :meth:`resume` in the others. Nothing is written
    before the first :meth:`keep`.
    """

    def __init__(
        self, profile: Profile, reason: str, run_dir: Path, manifest: dict, starts: bool = False
    ):
        self.profile, self.reason, self.run_dir, self.manifest = profile, reason, run_dir, manifest
        self._opened, self._locked, self._starts = time.time(), False, starts
        self._taken: dict[str, str] = {}  # what this process has read, and its hash then

    set_aside = staticmethod(set_aside)

    @property
    def base_name(self) -> str:
        """Name of the base model, without this machine's path: what an adapter that travels may say."""
        model = self.profile.model
        return Path(model).name if os.path.isdir(model) else model

    @property
    def load_device(self) -> str:
        """Where to load the model: main memory if FSDP will cut it up, else where it is used."""
        return "cpu" if SHARDED else self.profile.device

    @property
    def uploads(self) -> list[Path]:
        """The datasets that were uploaded, the newest last."""
        files = (path for path in (self.run_dir / "uploads").glob("[!.]*") if path.is_file())
        return sorted(files, key=lambda path: path.stat().st_mtime)

    def __repr__(self) -> str:
        said = f"档位 {self.profile.name}：{self.reason}\n成果都放在 {self.run_dir}"
        before = (_read(self.run_dir) or {}).get("profile", asdict(self.profile))
        if before != asdict(self.profile):
            said += "\n设置和上次不一样：把这一本运行到底，才会生效。"
        return said

    def quantization(self):
        """The BitsAndBytesConfig with which to load the base model, or None for full precision.

        Raises CourseError where 4 bits are asked for and bitsandbytes is not there.
        """
        if not self.profile.quantized:
            return None
        import torch
        from transformers import BitsAndBytesConfig

        if not importlib.util.find_spec("bitsandbytes"):
            raise CourseError(
                "gpu-4bit 档位需要 bitsandbytes：请先运行 pip install bitsandbytes，再重启内核。"
            )
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.profile.dtype),
        )

    @classmethod
    def start(cls, **overrides) -> "Course":
        """Choose the profile and open the run directory.

        `overrides` are fields of :class:`Profile`, e.g. ``Course.start(epochs=5)``.
        Raises CourseError for an unknown field or profile.
        """
        overrides = PERSONA.get("profile", {}) | overrides
        _check_settings(overrides)
        name, reason = choose_profile()
        if os.environ.get("HUANHUAN_MODEL"):
            overrides = {"model": os.environ["HUANHUAN_MODEL"]} | overrides
        profile = _for_this_machine(PROFILES[name], overrides)
        if not _is_there(profile.device):
            raise CourseError(f"这台机器上 PyTorch 用不了 {profile.device}：请去掉 device 这一项。")
        run_dir = _run_dir(name)
        old = _read(run_dir) or {}
        manifest = {
            "profile": asdict(profile),
            "reason": reason,
            "persona": PERSONA,
            "machine": machine(),
            "versions": versions(),
            "asked": _asked(),
        }
        for part in HANDED_ON:
            manifest[part] = old.get(part, {})
        return cls(profile, reason, run_dir, manifest, starts=True)

    @staticmethod
    def started() -> bool:
        """Whether notebook 01 has started a run on this machine, for this persona."""
        return _read(present_run_dir()) is not None

    @classmethod
    def resume(cls, *needs: str) -> "Course":
        """Reopen the run that notebook 01 started; `needs` names the entries this notebook reads.

        Raises CourseError, saying which notebook to run first, where one is not there.
        """
        run_dir = present_run_dir()
        manifest = _read(run_dir)
        if manifest is None:
            raise CourseError("这里还没有开始过课程：请先运行 01_setup.ipynb。")
        made_for = manifest["persona"].get("name")
        if made_for != PERSONA["name"]:
            raise CourseError(
                f"这里的成果是给“{made_for}”做的，现在的角色却是“{PERSONA['name']}”："
                "请把 HUANHUAN_PERSONA 改回去，或者从 01_setup.ipynb 重新开始。"
            )
        if PERSONA.get("profile") != manifest["persona"].get("profile"):
            raise CourseError("角色文件里的 profile 改过，还没有生效：请重新运行 01_setup.ipynb。")
        before, chosen = manifest.get("asked"), manifest["profile"]
        for name, value in _asked().items() if isinstance(before, dict) else ():
            if value and value not in (before.get(name), chosen.get("name"), chosen.get("model")):
                raise CourseError(
                    f"环境变量 {name} 现在是 {value}，运行 01 的时候是 {before.get(name) or '没有设'}："
                    "请重新运行 01_setup.ipynb，或者改回去。"
                )
        profile = Profile(**{k: v for k, v in manifest["profile"].items() if k in _SETTINGS})
        if not _is_there(profile.device):
            raise CourseError(
                f"这里的成果是在有 {profile.device} 的机器上做的，这台机器上 PyTorch 用不了它：请回到那台机器上，"
                "或者从 01_setup.ipynb 重新开始（做好的都留着）。"
            )
        if LAUNCHED and profile.device == "cuda":
            import torch

            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        course = cls(profile, manifest["reason"], run_dir, manifest)
        for name in needs:
            course.path(name)
        return course

    def path(self, name: str) -> Path:
        """Where `name` (a key of ARTEFACTS) lies: whole, and made of what is still there.

        Raises CourseError where it is missing, damaged, or no longer what the present dataset,
        model and settings would make; the message says what changed and which notebook to run.
        """
        if now := _read(self.run_dir):  # another notebook may have made it anew
            self.manifest |= {part: now[part] for part in HANDED_ON}
        what, entry = ARTEFACTS[name], self.manifest["files"].get(name)
        again = f"请重新运行 {what.made_by}.ipynb。"
        if entry and what.file and entry != what.file:
            raise CourseError(f"清单里的“{what.title}”不在运行目录里（{entry}），不用它：{again}")
        path = self.run_dir / (entry or "")  # an absolute entry stays as it is
        brought = not what.file
        if not entry or not os.path.exists(path):  # unlike Path.exists, whatever its name is
            raise CourseError(f"还缺少上一步的成果“{what.title}”：请先运行 {what.made_by}.ipynb。")
        known = self.manifest["known"].get(name) or {}
        try:
            files, digest = known["files"], known["id"]
            if self._taken.setdefault(name, digest) != digest:
                raise CourseError(
                    f"“{what.title}”在这个内核读入以后变了，内存里的还是以前的：请重启内核，从头运行这一本。"
                )
            now = _state(path, files, links=brought)
            if now != files:
                if now.keys() != files.keys() or _digest(path, now) != digest:
                    raise CourseError(f"“{what.title}”（{path.name}）被改动过，或者不完整：{again}")
                known["files"] = now  # touched, or copied: the same all the same
            record = {"of": {}, "settings": {}} if brought else self.record(name)
            for other, digest in record["of"].items():
                self.path(other)
                if self.manifest["known"][other]["id"] != digest:
                    raise CourseError(
                        f"“{what.title}”是用以前的“{ARTEFACTS[other].title}”做的，它后来变了：{again}"
                    )
            for setting, value in self._settings(name).items():
                if record["settings"][setting] != value:
                    raise CourseError(
                        f"“{what.title}”是按 {setting}={record['settings'][setting]} 做的，"
                        f"现在是 {value}：{again}"
                    )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            lacking = isinstance(error, LookupError | FileNotFoundError)
            why = "没有它的记录" if lacking else f"读不出来（{error}）"
            raise CourseError(f"“{what.title}”（{path.name}）{why}：{again}") from None
        return path

    def keep(self, name: str, path: str | Path) -> None:
        """List a file or folder that was brought, as `name`, and remember what it holds."""
        path = Path(path).resolve()
        if not _state(path, links=True):
            raise CourseError(f"“{ARTEFACTS[name].title}”{path} 里什么也没有。")
        inside = path.is_relative_to(self.run_dir)
        self._list(name, path.relative_to(self.run_dir).as_posix() if inside else str(path))

    @contextlib.contextmanager
    def replacing(self, target: Path) -> Iterator[Path]:
        """Write the file `target` of the run directory: yields a path beside it, taken over when written.

        A former one that differs gets a dated name. Raises CourseError where it cannot be written.
        """
        beside = target.with_name(f".{target.name}.{os.getpid()}.new")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.parent.resolve().is_relative_to(self.run_dir.resolve()):
                raise CourseError(f"{target.parent} 是一个链接，指到运行目录外面去了，不往里写。")
            yield beside
            same = target.is_file() and filecmp.cmp(beside, target, shallow=False)
            if not same or target.is_symlink():
                set_aside(target)
            beside.replace(target)

    @contextlib.contextmanager
    def making(self, name: str, **results) -> Iterator[Path]:
        """Make `name`: yields a path beside its place, to be written to, and takes it over when whole.

        A folder is there already, a file is not. What the thing was made of, the settings that
        decided it, and `results` (numbers, texts, lists of them) go into its record. Until all is
        written the former one stays as it is; then it gets a dated name. Raises CourseError where it
        cannot be written.
        """
        what = ARTEFACTS[name]
        target = self.run_dir / what.file
        beside = target.with_name(f"unfinished-{what.file}")
        is_file = bool(target.suffix)
        with self.locked(what.title), writing(beside):
            if RANK == 0:
                _remove(beside)
                (beside.parent if is_file else beside).mkdir(parents=True, exist_ok=True)
            of = {}
            for other in what.of:
                self.path(other)
                of[other] = self.manifest["known"][other]["id"]
            yield beside
            if RANK != 0:
                _all_here()
                self.manifest = _read(self.run_dir) or self.manifest
                return
            files = _state(beside)
            if not files:
                raise CourseError(f"“{what.title}”没有写出来：请重新运行 {what.made_by}.ipynb。")
            record = {
                "of": of, "settings": self._settings(name), "results": results,
                "versions": versions(), "made": time.strftime("%Y-%m-%d %H:%M:%S"),
            }  # fmt: skip
            write_json(_record(beside), record)
            self._change(lambda manifest: manifest["files"].pop(name, None))
            former = set_aside(target)
            if is_file and former and _record(target).exists():
                _record(target).replace(_record(former))
            if is_file:
                _record(beside).replace(_record(target))
            beside.rename(target)
            self._list(name, what.file)
            _all_here()

    def record(self, name: str) -> dict:
        """What `name` was made of: ``{"of", "settings", "results", "versions", "made", "used"}``.

        ``settings`` are the profile's, ``used`` those that the notebook went by in the end. Raises OSError or ValueError where there is no such record.
        """
        record = read_json(_record(self.run_dir / ARTEFACTS[name].file))
        if not all(isinstance(record.get(part), dict) for part in RECORDED):
            raise ValueError("缺了一部分")
        if not all(map(is_result, record["results"].values())):
            raise ValueError("成绩不像成绩")
        settings, results = record["settings"], record["results"]
        return record | {"used": settings | {n: x for n, x in results.items() if n in settings}}

    def _settings(self, name: str) -> dict:
        settings = {field: getattr(self.profile, field) for field in ARTEFACTS[name].settings}
        return settings | ({"system_prompt": SYSTEM_PROMPT} if name == "tokenized" else {})

    def _list(self, name: str, entry: str) -> None:
        path = self.run_dir / entry
        files = _state(path, links=not ARTEFACTS[name].file)
        known = {"files": files, "id": _digest(path, files)}

        def change(manifest: dict) -> None:
            manifest["files"][name], manifest["known"][name] = entry, known

        self._change(change)
        self._taken[name] = known["id"]

    def finish(self, notebook: str) -> None:
        """Print and record what this notebook took: minutes since it opened, peak memory of its process."""
        minutes, memory = (time.time() - self._opened) / 60, peak_memory_gib()
        took = {"minutes": round(minutes, 2), "peak_memory_gib": round(memory, 2)}
        self._change(lambda manifest: manifest["notebooks"].update({notebook: took}))
        print(f"✅ {notebook} 完成：用时 {lasting(minutes * 60)}，内存峰值 {memory:.2f} GiB")
        for name in self.manifest["files"]:
            print(f"   {name:<10}{self.manifest['files'][name]}")

    def _change(self, change: Callable[[dict], object]) -> None:
        """Apply `change` to the manifest as it is on disk now: another notebook may have written it."""
        if RANK != 0:
            return change(self.manifest)
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with _lock(self.run_dir / "manifest.lock", "清单", patience=10):
                now = _read(self.run_dir) or {}
                # What 01 decided stands as it was last decided; the rest is added to.
                kept = HANDED_ON if self._starts else now
                self.manifest |= {part: now[part] for part in kept if part in now}
                change(self.manifest)
                write_json(self.run_dir / "manifest.json", self.manifest)

    @contextlib.contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Be the only one that writes to the run directory. Raises CourseError naming who does now."""
        if self._locked or RANK != 0:
            yield
            return
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with _lock(self.run_dir / "run.lock", doing):
                self._locked = True
                try:
                    yield
                finally:
                    self._locked = False


def _all_here() -> None:
    """Wait for the other processes that train with this one, if there are any."""
    if "LOCAL_RANK" in os.environ:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()


@contextlib.contextmanager
def _lock(path: Path, doing: str, patience: float = 0) -> Iterator[None]:
    """Hold the lock file `path`; one whose owner is no longer alive is taken over.

    (No flock: the network drives that learners work on do not have it.)
    """
    import psutil

    me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "doing": doing,
          "host": platform.node(), "since": time.strftime("%H:%M:%S")}  # fmt: skip
    until, done = time.monotonic() + patience, threading.Event()

    def beat() -> None:
        while not done.wait(STALE / 20):
            with contextlib.suppress(OSError):
                os.utime(path)

    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(me, file)
            _held.add(str(path))
            break
        except FileExistsError:
            owner = _owner(path)
        if owner is None:
            continue
        if time.monotonic() >= until:
            who = "（进程 {pid}，{since} 起）".format_map(owner) if owner else ""
            raise CourseError(
                f"另一个内核{who}正在用这个运行目录做“{owner.get('doing', doing)}”：请等它做完，或者关掉它（菜单 内核 → 关闭内核 / Kernel → Shut Down Kernel），再运行这一格。"
                f"要是没有这样的内核，删掉 {path} 就行。"
            )
        time.sleep(0.02)
    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        _held.discard(str(path))
        path.unlink(missing_ok=True)


_held: set[str] = set()  # the locks of this process
STALE = 600  # seconds after which a lock that nobody has touched is nobody's, on whatever machine


def _owner(path: Path) -> dict | None:
    """Who holds the lock; None, and the lock is gone, where that one is no longer alive."""
    import psutil

    untouched = 0.0  # seconds
    try:
        untouched = abs(time.time() - path.stat().st_mtime)
        owner = {"since": "？"} | read_json(path)
        if owner["host"] != platform.node():
            alive = untouched < STALE
        elif owner["pid"] == os.getpid():  # left behind by a ■ in between
            alive = str(path) in _held
        else:
            started = psutil.Process(owner["pid"]).create_time()
            alive = abs(started - owner["started"]) < 1
        if alive:
            return owner
    except FileNotFoundError:  # given up in the meantime; or no file at all
        return {} if path.is_dir() or path.is_symlink() else None
    except (ValueError, KeyError, TypeError, OSError):  # being written now, or never finished
        if untouched < 5:
            return {}
    except psutil.Error:
        pass
    with contextlib.suppress(OSError):
        path.unlink()
        return None
    return {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a full, read-only or forbidden disk becomes a CourseError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text, number = str(error), getattr(error, "errno", None)
        place = next((p for p in (path, *path.parents) if os.path.exists(p)), path)
        # What Rust (safetensors), Arrow and torch say of it, without a number.
        words = ("os error 28", "No space left", "file write failed")
        full = number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        if full or any(word in text for word in words):
            free = shutil.disk_usage(place).free
            raise CourseError(
                f"磁盘满了（{place} 只剩 {size(free)}），这一次的没有写成，以前的都在。"
                "请清出空间（05 里有清单），或者把 HUANHUAN_OUTPUT 设成别的磁盘上的目录，再运行一次。"
            ) from None
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise CourseError(
                f"{place} 不能写：请把环境变量 HUANHUAN_OUTPUT 设成一个可以写的目录，再从 01 开始。"
            ) from None
        if isinstance(error, OSError):
            raise CourseError(
                f"读写 {place} 时出错（{text[:200]}）：请检查这个位置，或者把 HUANHUAN_OUTPUT 设成别的目录，"
                "再运行一次；以前做好的都在。"
            ) from None
        raise


# Of an adapter's config, what need not stand at peft's default.
PLAIN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "inference_mode",
    "base_model_name_or_path", "peft_version", "use_rslora", "use_dora",
}  # fmt: skip


def check_adapter(folder: Path, strangers: bool = False) -> None:
    """Raises CourseError where an adapter is damaged, empty or not a number, or is no plain LoRA.

    What its config and tokenizer say must not make a library import something, or make a matrix of
    another size than the one that is there. Of a stranger's, nothing but what the course writes.
    """
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    ranks, learnt, numbers = set(), False, True
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                half = tensor.is_floating_point() and tensor.dtype.itemsize >= 2
                if (
                    not half
                    or not 1 <= tensor.ndim <= 2
                    or (".lora_A." in name and tensor.ndim < 2)
                ):
                    raise ValueError(f"{name} 不是 LoRA 的矩阵")
                learnt |= bool(tensor.any())
                numbers &= bool(tensor.isfinite().all())
                ranks |= {tensor.shape[0]} if ".lora_A." in name else set()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CourseError(f"适配器 {file} 读不出来（{error}）。") from None
    if not learnt:
        raise CourseError(f"适配器 {file} 里没有学到的东西，全是空的。")
    if not numbers:
        raise CourseError(
            f"适配器 {file} 里有不是数的数（NaN），用不了：请用原来那一份，或者重新训练。"
        )
    try:
        from peft import LoraConfig

        said, usual = read_json(config), LoraConfig().to_dict()
        names, alpha, dropout = said["target_modules"], said["lora_alpha"], said.get("lora_dropout")
        plain = said["peft_type"] == "LORA" and ranks == {said["r"]}
        plain &= not said.get("auto_mapping") and said.get("task_type") in (None, "CAUSAL_LM")
        plain &= isinstance(names, list) and all(re.fullmatch(r"[\w.]+", name) for name in names)
        plain &= type(alpha) in (int, float) and 0 < alpha < 1e6 and 0 <= (dropout or 0) < 1
        if strangers:
            plain &= all(said[n] == usual[n] for n in said.keys() & usual.keys() - PLAIN)
            plain &= all(type(said.get(n, False)) is bool for n in ("use_rslora", "use_dora"))
        tokenizer = folder / "tokenizer_config.json"
        if tokenizer.exists() and plain:
            plain = "auto_map" not in read_json(tokenizer)
    except (OSError, ValueError, LookupError, TypeError):
        plain = False
    if not plain:
        raise CourseError(f"适配器 {folder} 的设置读不出来，或者不是普通的 LoRA：不用它。")


def size(count: float) -> str:
    """So many bytes, in a unit that says something: ``9.0 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def lasting(seconds: float) -> str:
    """So long, in a unit that says something: ``41 秒``."""
    return f"{seconds:.0f} 秒" if seconds < 60 else f"{seconds / 60:.1f} 分钟"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_result(value) -> bool:
    """A number, a text, or how many of how many."""
    if isinstance(value, list):
        return len(value) == 2 and all(type(n) is int for n in value) and 0 <= value[0] <= value[1]
    return isinstance(value, int | float | str)


def _record(path: Path) -> Path:
    return path / RECORD if path.is_dir() else path.with_name(f"{path.name}.{RECORD}")


def _state(path: Path, names=None, links=False) -> dict[str, list[int]]:
    """Size and time of every file of `path`, or of those named; hidden ones are passed over.

    And so are links, unless `links`: models are kept as links to where they were downloaded.
    """
    if path.is_file():
        found = {"": path}
    else:
        there = (f for f in path.rglob("*") if f.is_file() and (links or not f.is_symlink()))
        found = {file.relative_to(path).as_posix(): file for file in there}
        hidden = re.compile(r"(^|/)\.")
        found = {
            name: file
            for name, file in sorted(found.items())
            if name != RECORD and not hidden.search(name)
        }
    return {
        name: [file.stat().st_size, file.stat().st_mtime_ns]
        for name, file in found.items()
        if names is None or name in names
    }


def _digest(path: Path, files) -> str:
    """One hash of all those files' names and content."""
    whole = hashlib.sha256()
    for name in files:
        file = path / name if name else path
        length = file.stat().st_size
        whole.update(f"{name}\0{length}\0".encode())
        with file.open("rb") as content:
            if length <= SAMPLED:
                starts, step = range(0, length, 2**20), 2**20
            else:
                starts, step = (0, length // 2, length - 2**20), 2**20
            for start in starts:
                content.seek(start)
                whole.update(content.read(step))
    return whole.hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write `content` beside `path` and rename it when whole: a crash leaves the old file.

    Raises CourseError where the disk is full or not to be written.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    with writing(path):
        beside.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        beside.replace(path)


def _asked() -> dict[str, str]:
    """What the environment asks of notebook 01, as others may still hear it."""
    names = ("HUANHUAN_PROFILE", "HUANHUAN_MODEL", "HUANHUAN_DATA")
    return {name: os.environ.get(name, "") for name in names}


def present_run_dir() -> Path:
    """The run directory of this machine's profile, there already or not."""
    return _run_dir(choose_profile()[0])


def _run_dir(profile: str) -> Path:
    """HUANHUAN_OUTPUT, or a folder named after the profile, and the persona where it is another."""
    persona = os.environ.get("HUANHUAN_PERSONA")
    name = f"{profile}-{Path(persona).stem}" if persona else profile
    return Path(os.path.realpath(os.environ.get("HUANHUAN_OUTPUT") or NOTEBOOKS / "output" / name))


def _read(run_dir: Path) -> dict | None:
    path = run_dir / "manifest.json"
    if not os.path.lexists(path):
        return None
    try:
        manifest = {part: {} for part in HANDED_ON} | {"reason": ""}
        manifest |= read_json(path)
        parts = [manifest[part] for part in (*HANDED_ON, "profile", "persona")]
        parts += manifest["known"].values()
        texts = [manifest["reason"], *manifest["files"].values()]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        settings = {name: x for name, x in manifest["profile"].items() if name in _SETTINGS}
        _check_settings(settings)
        Profile(**settings)
        return manifest
    except (OSError, ValueError, TypeError, LookupError, AttributeError, CourseError):
        raise CourseError(
            f"{path} 读不出来了（不完整，或者被改坏了）：请把它改名，再重新运行 01_setup.ipynb。"
        ) from None


def machine() -> str:
    """This machine in a few words: system, cores, memory, GPU."""
    import psutil

    words = [platform.system(), platform.machine(), f"{os.cpu_count()} 核"]
    words.append(f"{psutil.virtual_memory().total / 2**30:.0f} GiB 内存")
    if gpu := gpu_name():
        words.append(gpu)
    return "，".join(words)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages the course stands on; missing ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory_gib() -> float:
    """The most memory (RSS) this process has held, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: on Linux it also counts the process that launched this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS
