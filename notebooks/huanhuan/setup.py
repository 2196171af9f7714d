"""Room 01: is this machine fit for the course? Find the model and the data."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

from huanhuan.course import NOTEBOOKS, Course, CourseError
from huanhuan.persona import SAMPLE

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
    import torch
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
        "通过" if sys.version_info >= (3, 10) else "不行",
        version,
        "请换用 Python 3.10 或更新的版本",
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
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "没有"
    add(
        "GPU",
        "通过" if big else "提醒",
        gpu,
        "没关系：用小模型走完同样的步骤；想训练 3B，请到带 GPU 的平台上打开",
    )
    memory = psutil.virtual_memory().available / 2**30
    add(
        "可用内存",
        "通过" if memory >= (8 if big else 3) else "提醒",
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
    uploads = sorted((course.run_dir / "uploads").glob("*"), key=lambda path: path.stat().st_mtime)
    if typed:
        asked, whose = typed, "你在这一格里写的"
    elif os.environ.get("HUANHUAN_DATA"):
        asked, whose = os.environ["HUANHUAN_DATA"], "环境变量 HUANHUAN_DATA 指定的"
    elif uploads:
        asked, whose = uploads[-1], "你上传的"
    else:
        asked, whose = SAMPLE, "课程自带的样例"
    path = Path(asked).expanduser().resolve()
    if not path.is_file():
        raise CourseError(
            f"找不到数据集 {asked}（完整路径 {path}）：请检查文件名，相对路径从笔记本所在的目录算起。"
        )
    print(f"数据集：{path.name}（{whose}）")
    return path


def local_folder(model: str) -> str | None:
    """`model` as an absolute path where it is a folder on this disk, else None (a hub id)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith(("./", "../", "~")):
        raise CourseError(f"找不到模型目录 {model}：请检查 HUANHUAN_MODEL。")
    return None


def check_model(model_dir: str | Path) -> str:
    """See that a downloaded model is whole; returns a line about its size.

    Raises CourseError naming what is missing.
    """
    folder = Path(model_dir)
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        needed.add("model.safetensors")
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise CourseError(
            f"模型目录 {folder} 里缺少 {'、'.join(missing)}：多半是下载中断了，请再运行一次下载那一格，会接着下完。"
        )
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"模型完整：{len(files)} 个文件，共 {sum(path.stat().st_size for path in files) / 2**20:,.0f} MiB"
