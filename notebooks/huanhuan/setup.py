"""Room 01: is this machine fit for the course, and the model? Find the model and the data."""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from huanhuan import NOTEBOOKS, CourseError, bare, read_json
from huanhuan.course import (
    ARTEFACTS,
    CPU_ONLY_TORCH,
    SMALL_MEMORY_GIB,
    Course,
    gpu_name,
    idle_gpu,
    size,
)
from huanhuan.persona import SAMPLE
from huanhuan.prompt import check_template, end_id, pad_token, prompt_ids
from huanhuan.reader import fill_placeholders

REQUIREMENTS = NOTEBOOKS.parent / "requirements.txt"


def install_missing() -> None:
    """Install the packages of requirements.txt that are not here at all.

    What is here stays as it is, in whatever version: a platform's own torch fits its driver.
    Raises CourseError where torch itself is missing, or pip fails.
    """
    missing = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name = re.match(r"[\w-]+", line)
        if name and importlib.util.find_spec(name[0].replace("-", "_")) is None:
            missing.append(line.strip())
    if not missing:
        print("需要的包都在，不用安装。")
        return
    if "torch" in missing:
        raise CourseError(
            "这个环境里没有 PyTorch：在云平台上请换成带 PyTorch 的镜像；在自己的电脑上请按 README 安装，再从这里重新运行。"
        )
    print("正在安装：", "、".join(missing))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *missing], capture_output=True, text=True
    )
    if done.returncode:
        raise CourseError(
            f"安装失败，请检查网络后再运行一次这一格。pip 说：{done.stderr.strip()[-500:]}"
        )
    importlib.invalidate_caches()
    print("装好了。")


def check_machine(course: Course) -> pd.DataFrame:
    """What the course needs against what is here: one row a requirement.

    Columns: 项目, 结果 (通过 / 提醒 / 不行), 看到的, 怎么办 (empty where 通过).
    """
    import psutil
    from packaging.requirements import Requirement

    rows = []

    def add(item: str, verdict: str, seen: str, fix: str = "") -> None:
        rows.append(
            {
                "项目": item,
                "结果": verdict,
                "看到的": seen,
                "怎么办": "" if verdict == "通过" else fix,
            }
        )

    version = ".".join(map(str, sys.version_info[:3]))
    add(
        "Python",
        "不行" if sys.version_info < (3, 10) else "通过" if sys.version_info < (3, 14) else "提醒",
        version,
        "课程在 Python 3.10–3.13 上试过，请换成其中一个",
    )
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        need = Requirement(line)
        try:
            seen = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            add(need.name, "不行", "没有安装", f'请运行 pip install "{need}"，再重启内核')
            continue
        fits = need.specifier.contains(seen, prereleases=True)
        add(
            need.name,
            "通过" if fits else "提醒",
            seen,
            f'课程在 {need.specifier} 上验证过；若后面出错，运行 pip install "{need}"',
        )

    big = course.profile.device == "cuda"
    memory = psutil.virtual_memory().available / 2**30
    without = "没关系：用小模型走完同样的步骤；想训练 3B，请到带 GPU 的平台上打开"
    if memory >= SMALL_MEMORY_GIB:
        without += (
            "。想在这台电脑上训练一个真正的中文小模型：设 HUANHUAN_PROFILE=cpu-small，重新运行"
        )
    add(
        "GPU",
        "通过" if course.profile.device != "cpu" else "提醒",
        gpu_name() or ("有，用不上" if idle_gpu() else "没有"),
        CPU_ONLY_TORCH if idle_gpu() else without,
    )
    add(
        "可用内存",
        "通过" if memory >= (3 if course.profile.name == "cpu-tiny" else 8) else "提醒",
        f"{memory:.1f} GiB",
        "请关掉别的程序或别的笔记本内核",
    )
    place = next(p for p in (course.run_dir, *course.run_dir.parents) if p.exists())
    disk = shutil.disk_usage(place).free / 2**30
    add(
        "可用磁盘",
        "通过" if disk >= (20 if big else 1) else "提醒" if big and disk >= 8 else "不行",
        f"{disk:.1f} GiB",
        "请清出空间，或用 HUANHUAN_OUTPUT 换一个目录"
        + ("：模型约 6 GiB，04 导出时再写约 12 GiB" if big else ""),
    )
    return pd.DataFrame(rows)


def dataset_file(course: Course, typed: str = "") -> Path:
    """The dataset of this run, with a printed word about whose it is.

    The first there is of: `typed` in the notebook, ``HUANHUAN_DATA``, the newest upload, the
    course's sample. Raises CourseError where a file that was named does not exist.
    """
    if typed:
        asked, whose = typed, "你在这一格里写的"
    elif os.environ.get("HUANHUAN_DATA"):
        asked, whose = os.environ["HUANHUAN_DATA"], "环境变量 HUANHUAN_DATA 指定的"
    elif course.uploads:
        asked, whose = course.uploads[-1], "你上传的"
    else:
        asked, whose = SAMPLE, "课程自带的样例"
    asked = os.path.expanduser(bare(str(asked)))
    places = [os.path.join(place, asked) for place in (Path.cwd(), NOTEBOOKS.parent)]
    found = [place for place in places if os.path.isfile(place)]
    if not found:
        raise CourseError(
            f"找不到数据集 {asked[:200]}：请检查文件名。找过的地方是 {Path.cwd()}、{NOTEBOOKS.parent}。"
        )
    path = Path(os.path.realpath(found[0]))
    print(f"数据集：{path.name}（{whose}）")
    return path


def without_placeholders(
    course: Course, path: Path, rows: pd.DataFrame, values: dict[str, str]
) -> tuple[Path, pd.DataFrame]:
    """The dataset and its rows with each placeholder replaced by what `values` says.

    A dataset that has some is written anew into the run directory; the file that was brought stays
    as it is. Raises CourseError where one is left that `values` does not name.
    """
    marks = rows.attrs["placeholders"]
    if not marks:
        return path, rows
    if left := [mark for mark in marks if mark not in values]:
        named = "、".join(f"{mark}（{marks[mark]} 条）" for mark in left)
        raise CourseError(
            f"数据里有还没填的占位符：{named}。照这样训练，她会原样说出来。请在这一格里写上换成什么，"
            f'例如 my_names = {{"{left[0]}": "甄嬛"}}；本来就要原样留着的，写它自己。'
        )
    if not all(isinstance(value, str) for value in values.values()):
        raise CourseError("my_names 里，每个占位符换成的都要是带引号的文字。")
    rows = fill_placeholders(rows, values)
    path = course.run_dir / "filled.json"
    with course.replacing(path) as file:
        rows.to_json(file, orient="records", force_ascii=False, indent=1)
    print(f"占位符换好了，用的是 {path}，你的原文件没有动。")
    return path, rows


def local_folder(model: str) -> str | None:
    """`model` as an absolute path where it is a folder on this disk, else None (a hub id).

    A hub id has two parts, ``owner/name``. Raises CourseError for what is neither.
    """
    path = os.path.expanduser(model)
    if model and os.path.isdir(path):
        return os.path.realpath(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise CourseError(
            f"找不到模型目录 {model[:200]}，它也不是“作者/模型”这样两段的魔搭名字：请检查 HUANHUAN_MODEL 有没有写错。"
        )
    return None


@contextlib.contextmanager
def reaching(model: str) -> Iterator[None]:
    """Turns what goes wrong while a hub is asked for `model` into one sentence."""
    try:
        yield
    except CourseError:
        raise
    except Exception as error:  # every version of the client has exceptions of its own
        why = " ".join(str(error).split())[:200]
        raise CourseError(
            f"从魔搭取不到模型 {model}：请检查名字（在魔搭的网页上照抄），以及网络；"
            f"已经下载好的，把 HUANHUAN_MODEL 设成它的目录。客户端说：{type(error).__name__} {why}"
        ) from None


PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
LITTLE = (".json", ".jinja", ".model", ".txt", ".md")  # what tells a model's kind; a few MB


def look_at_model(course: Course) -> str:
    """See whether the course can use the profile's model, before its weights are downloaded.

    Configuration, tokenizer and chat template are fetched where they are not here. Returns a
    sentence on what was found. Raises CourseError, one sentence with what to do, for weights that
    are missing, pickled or quantised, code that would have to be run, a kind of model that the
    installed transformers does not know, a template that does not do, too little room on the disk.
    """
    model, revision = course.profile.model, course.profile.revision
    folder = local_folder(model)
    if folder:
        with os.scandir(folder) as found:
            sizes = {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
    else:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi

        with reaching(model):
            listed = HubApi().get_model_files(model, revision=revision, recursive=True)
            sizes = {file["Path"]: file["Size"] for file in listed if file.get("Type") != "tree"}
            little = [name for name in sizes if "/" not in name and name.endswith(LITTLE)]
            folder = snapshot_download(model, revision=revision, allow_patterns=little)
    weights = sum(n for name, n in sizes.items() if re.fullmatch(r"[^/]+\.safetensors", name))
    if not weights:
        if any(name.endswith(PICKLED) for name in sizes):
            raise CourseError(
                f"{model} 的权重是 pickle 格式（.bin、.pth），读它可能会执行别人写的程序，课程不读："
                "请换一个带 .safetensors 文件的版本。"
            )
        raise CourseError(f"{model} 里没有权重（*.safetensors）：请检查名字，或者重新下载。")
    tokenizer = check_kind(folder)
    taken = len(prompt_ids(tokenizer, ""))
    if taken + 16 > course.profile.max_length:
        raise CourseError(
            f"角色的提示词连同格式已经占了 {taken} 个词元，max_length={course.profile.max_length} "
            "里放不下问题和回答：请把提示词写短，或者用 Course.start(max_length=…) 改大。"
        )
    room = shutil.disk_usage(folder).free
    here = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if weights - here > room:
        raise CourseError(
            f"模型的权重有 {weights / 2**30:.1f} GiB，{folder} 所在的磁盘只剩 {room / 2**30:.1f} GiB："
            "请清出空间，或者用环境变量 MODELSCOPE_CACHE 换一个磁盘。"
        )
    return (
        f"可以用：权重 {weights / 2**20:,.0f} MiB；回答以 {tokenizer.decode([end_id(tokenizer)])} 结束，"
        f"用 {pad_token(tokenizer)} 填充"
    )


def check_kind(folder: str | Path):
    """See that the model in `folder` is of a kind that the course can train; returns its tokenizer.

    Reads configuration and tokenizer only. Raises CourseError, one sentence, where it is not.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    read = {}
    for name in ("config.json", "tokenizer_config.json"):
        try:
            read[name] = read_json(Path(folder) / name)
        except FileNotFoundError:
            raise CourseError(
                f"模型目录 {folder} 里缺少 {name}：请换一个 transformers 格式的模型，或者重新下载。"
            ) from None
        except (OSError, ValueError) as error:
            raise CourseError(f"模型的 {name} 读不出来（{error}）：请删掉它，重新下载。") from None
    config = read["config.json"]
    if any("auto_map" in one for one in read.values()):
        raise CourseError(
            "这个模型要执行随它下载来的程序（配置里的 auto_map）才能用，课程不执行陌生的程序："
            "请换一个 transformers 自带支持的版本，例如名字以 -hf 结尾的那个。"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CourseError(
            f"这里装的 transformers {__version__} 不认识“{kind}”这种对话模型：先运行 "
            "pip install --upgrade transformers 再重启内核；还是不行，请换一个模型。"
        )
    if "quantization_config" in config:
        raise CourseError("这份权重是压缩（量化）过的，不能在上面训练：请换没有量化的那个版本。")
    if (Path(folder) / "adapter_config.json").exists():
        raise CourseError(
            f"{folder} 里混着一个适配器（adapter_config.json），加载时会一起算进去，看不出微调前是什么样："
            "请把模型和适配器分开放。"
        )
    try:
        AutoConfig.from_pretrained(folder)
        if (Path(folder) / "generation_config.json").exists():
            GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each kind of tokenizer fails in its own way
        why = " ".join(str(error).split())[:200]
        raise CourseError(
            f"模型的配置（config.json、generation_config.json）或分词器用不了（{why}）：请重新下载，或者换一个模型。"
        ) from None
    check_template(tokenizer)
    return tokenizer


def check_model(model_dir: str | Path) -> str:
    """See that a downloaded model is whole; returns a line about its size.

    Raises CourseError naming what is missing or cut short.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(model_dir)
    needed, weights = {"config.json", "tokenizer_config.json"}, {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weights = set(read_json(index)["weight_map"].values())
            if not all(isinstance(name, str) for name in weights) or not weights:
                raise ValueError
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise CourseError(
                f"模型目录 {folder} 里的 {index.name} 坏了：请删掉它，再运行一次下载那一格。"
            ) from None
    missing = sorted(name for name in needed | weights if not (folder / name).is_file())
    if missing:
        raise CourseError(
            f"模型目录 {folder} 里缺少 {'、'.join(missing)}：多半是下载中断了，请再运行一次下载那一格，会接着下完。"
        )
    tensors, numbers = 0, 0
    for name in sorted(weights):
        try:
            with safe_open(folder / name, "pt") as file:  # reads the head, which knows the length
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        except (OSError, SafetensorError):
            raise CourseError(
                f"模型目录 {folder} 里的 {name} 不完整：请删掉它，再运行一次下载那一格。"
            ) from None
        tensors, numbers = tensors + len(shapes), numbers + sum(map(math.prod, shapes))
    if numbers < _needed(folder, tensors):  # transformers would fill up what lacks with random ones
        raise CourseError(
            f"模型目录 {folder} 里的权重比 config.json 说的少：请重新下载，或者换一个模型。"
        )
    files = [path for path in folder.iterdir() if path.is_file()]
    return f"模型完整：{len(files)} 个文件，共 {sum(path.stat().st_size for path in files) / 2**20:,.0f} MiB"


def _needed(folder: Path, tensors: int) -> float:
    """How many numbers the model is to have by its config.json; infinite where `tensors` cannot do."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if config.get_text_config().num_hidden_layers > tensors:
        return math.inf
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception:  # each kind of model fails in its own way; then loading it says so
        return 0


def doctor(course: Course) -> pd.DataFrame:
    """What is whole, what cannot be used and what is not there yet; the one next thing to do is printed.

    Columns: 项目, 状况 (完好 / 还没有 / 不能用), 说明. Looks, and changes nothing.
    """
    rows = [
        (row.项目, "不能用", f"{row.看到的}：{row.怎么办}")
        for row in check_machine(course).itertuples()
        if row.结果 == "不行"
    ]
    rows = rows or [("机器", "完好", f"档位 {course.profile.name}：{course.reason}")]
    place = next(p for p in (course.run_dir, *course.run_dir.parents) if p.exists())
    if os.access(place, os.W_OK):
        free = size(shutil.disk_usage(place).free)
        rows.append(("运行目录", "完好", f"{course.run_dir}，所在的磁盘还有 {free}"))
    else:
        rows.append(("运行目录", "不能用", f"{place} 不能写：请把 HUANHUAN_OUTPUT 设成别的目录。"))
    for name, what in ARTEFACTS.items():
        try:
            path = course.path(name)
            told = check_model(path) if name == "model" else path.name
            rows.append((what.title, "完好", told))
        except CourseError as error:
            there = name in course.manifest["files"]
            rows.append((what.title, "不能用" if there else "还没有", str(error)))
    found = pd.DataFrame(rows, columns=["项目", "状况", "说明"])
    wrong = found[found["状况"] != "完好"]
    print(f"下一步：{wrong['说明'].iloc[0]}" if len(wrong) else "都完好，没有要做的。")
    return found
