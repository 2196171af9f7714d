"""The ground floor: the profile that fits this machine, and the manifest one notebook hands the next.

Everything a run leaves behind lies in one directory, ``HUANHUAN_OUTPUT`` or
``notebooks/output/<profile>``, and is listed in its ``manifest.json``.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from huanhuan import DATA, NOTEBOOKS, CourseError
from huanhuan.persona import PERSONA

# What is handed on, in the order it is made, and the notebook that makes it.
MADE_BY = {
    "data": "01_setup",
    "model": "01_setup",
    "tokenized": "02_preprocess",
    "adapter": "03_train_lora",
    "answers": "04_infer",
    "pack": "04_infer",
}

# One process uses one GPU. Given several, the Trainer would cut every batch into parts for them, and
# a packed batch cannot be cut. A launcher (torchrun) hands out the GPUs itself.
RANK = int(os.environ.get("RANK", 0))  # of this process among those that train together
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # a model cut into parts, one a process
if "LOCAL_RANK" not in os.environ:
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
    save_steps: int = 200


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
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}
        if not there[PROFILES[asked].device]:
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


class Course:
    """One run of the course: its profile, its directory and its manifest.

    Made by :meth:`start` in notebook 01 and by :meth:`resume` in the others. Nothing is written
    before the first :meth:`keep`.
    """

    def __init__(self, profile: Profile, reason: str, run_dir: Path, manifest: dict):
        self.profile, self.reason, self.run_dir, self.manifest = profile, reason, run_dir, manifest
        self._opened = time.time()

    @property
    def base_name(self) -> str:
        """Name of the base model, without this machine's path: what an adapter that travels may say."""
        model = self.profile.model
        return Path(model).name if Path(model).is_dir() else model

    @property
    def load_device(self) -> str:
        """Where to load the model: main memory if FSDP will cut it up, else where it is used."""
        return "cpu" if SHARDED else self.profile.device

    def __repr__(self) -> str:
        return f"档位 {self.profile.name}：{self.reason}\n成果都放在 {self.run_dir}"

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
        unknown = set(overrides) - {f.name for f in fields(Profile)}
        if unknown:
            known = "、".join(f.name for f in fields(Profile))
            raise CourseError(
                f"档位里没有 {'、'.join(sorted(unknown))} 这一项，可以改的有：{known}。"
            )
        name, reason = choose_profile()
        if os.environ.get("HUANHUAN_MODEL"):
            overrides = {"model": os.environ["HUANHUAN_MODEL"]} | overrides
        profile = _for_this_machine(PROFILES[name], overrides)
        run_dir = _run_dir(name)
        old = _read(run_dir) or {}
        manifest = {
            "profile": asdict(profile),
            "reason": reason,
            "persona": PERSONA,
            "machine": machine(),
            "versions": versions(),
        }
        for part in ("files", "stamps", "results", "notebooks"):
            manifest[part] = old.get(part, {})
        return cls(profile, reason, run_dir, manifest)

    @classmethod
    def resume(cls, *needs: str) -> "Course":
        """Reopen the run that notebook 01 started; `needs` names the entries this notebook reads.

        Raises CourseError, saying which notebook to run first, where one is not there.
        """
        run_dir = _run_dir(choose_profile()[0])
        manifest = _read(run_dir)
        if manifest is None:
            raise CourseError("这里还没有开始过课程：请先运行 01_setup.ipynb。")
        made_for = manifest.get("persona", PERSONA)
        if made_for != PERSONA:
            raise CourseError(
                f"这里的成果是给“{made_for['name']}”做的，现在的角色却是“{PERSONA['name']}”："
                "请把 HUANHUAN_PERSONA 改回去，或者从 01_setup.ipynb 重新开始。"
            )
        known = {f.name for f in fields(Profile)}
        profile = Profile(**{k: v for k, v in manifest["profile"].items() if k in known})
        if "LOCAL_RANK" in os.environ and profile.device == "cuda":
            import torch

            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        course = cls(profile, manifest["reason"], run_dir, manifest)
        for name in needs:
            course.path(name)
        return course

    def path(self, name: str) -> Path:
        """Where `name` (a key of MADE_BY) lies. Raises CourseError if it does not."""
        entry = self.manifest["files"].get(name)
        path = self.run_dir / entry if entry else None  # an absolute entry stays as it is
        if path is None or not path.exists():
            raise CourseError(f"还缺少上一步的成果“{name}”：请先运行 {MADE_BY[name]}.ipynb。")
        return path

    def keep(self, name: str, path: str | Path) -> None:
        """List `path` in the manifest as `name`.

        A changed dataset or model, or an adapter trained anew, makes what was built on it stale:
        later entries are taken off the list, so that the later notebooks ask to be run again.
        Their files stay.
        """
        path = Path(path).resolve()
        inside = path.is_relative_to(self.run_dir)
        entry = path.relative_to(self.run_dir).as_posix() if inside else str(path)
        stamp = [entry, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [entry]
        files, stamps, order = self.manifest["files"], self.manifest["stamps"], list(MADE_BY)
        stale = []
        if name == "adapter":
            stale = order[order.index("adapter") + 1 :]
        elif name in ("data", "model") and files.get(name) and stamps.get(name) != stamp:
            stale = order[order.index("tokenized") :]
        for later in stale:
            files.pop(later, None)
        files[name], stamps[name] = entry, stamp
        self._write()

    def note(self, **results) -> None:
        """Add results (numbers, texts, lists of them) to the manifest."""
        self.manifest["results"].update(results)
        self._write()

    def set_aside(self, path: Path) -> Path | None:
        """Give a file or folder of an earlier run a new name, so that nothing is overwritten.

        Returns the new path, or None where there was nothing to move.
        """
        if RANK != 0 or not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return None
        stamp = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        count, moved = 1, path.with_name(f"{path.stem}-{stamp}{path.suffix}")
        while moved.exists():
            count += 1
            moved = path.with_name(f"{path.stem}-{stamp}-{count}{path.suffix}")
        return path.rename(moved)

    def finish(self, notebook: str) -> None:
        """Print and record what this notebook took: minutes since it opened, peak memory of its process."""
        minutes, memory = (time.time() - self._opened) / 60, peak_memory_gib()
        self.manifest["notebooks"][notebook] = {
            "minutes": round(minutes, 2),
            "peak_memory_gib": round(memory, 2),
        }
        self._write()
        print(f"✅ {notebook} 完成：用时 {minutes:.1f} 分钟，内存峰值 {memory:.2f} GiB")
        for name in self.manifest["files"]:
            print(f"   {name:<10}{self.manifest['files'][name]}")

    def _write(self) -> None:
        if RANK != 0:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "manifest.json", self.manifest)


def write_json(path: Path, content: dict) -> None:
    """Write `content` beside `path` and rename it when whole: a crash leaves the old file."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    beside.replace(path)


def _run_dir(profile: str) -> Path:
    """HUANHUAN_OUTPUT, or a folder named after the profile, and the persona where it is another."""
    persona = os.environ.get("HUANHUAN_PERSONA")
    name = f"{profile}-{Path(persona).stem}" if persona else profile
    return Path(os.environ.get("HUANHUAN_OUTPUT") or NOTEBOOKS / "output" / name).resolve()


def _read(run_dir: Path) -> dict | None:
    path = run_dir / "manifest.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CourseError(
            f"{path} 读不出来了（不是完整的 JSON）：请把它改名，再重新运行 01_setup.ipynb。"
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
