"""Room 05: memory and disk."""

import gc
import shutil
from pathlib import Path

import pandas as pd
import psutil
import torch

from huanhuan.course import Course, CourseError, writing


def memory() -> dict[str, float]:
    """What is held now, in MiB.

    ``tensors``: tensors that Python can still reach, on any device. With a GPU also ``allocated``
    (by its tensors) and ``reserved`` (by torch from the driver), else ``process`` (all that it holds).
    """
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # type(), for isinstance would wake lazy modules
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    held = {"tensors": sum(sizes.values()) / 2**20}
    if torch.cuda.is_available():
        held |= {
            "allocated": torch.cuda.memory_allocated() / 2**20,
            "reserved": torch.cuda.memory_reserved() / 2**20,
        }
    else:
        held["process"] = psutil.Process().memory_info().rss / 2**20
    return held


def on_disk(course: Course) -> pd.DataFrame:
    """What lies in the run directory: name, files, MiB; largest first."""
    rows = []
    for path in course.run_dir.iterdir() if course.run_dir.exists() else []:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        rows.append(
            (path.name, len(files), round(sum(file.stat().st_size for file in files) / 2**20, 2))
        )
    return pd.DataFrame(sorted(rows, key=lambda row: -row[2]), columns=["名称", "文件数", "MiB"])


def remove(course: Course, names: list[str], really: bool = False) -> None:
    """Remove `names` (of :func:`on_disk`) from the run directory; only shows them unless `really`.

    Raises CourseError, before anything is removed, for a name that is not in that list, or is a
    link: it may lead out of the run directory.
    """
    listed = course.run_dir.iterdir() if course.run_dir.exists() else []
    there = {path.name: path for path in listed if not path.is_symlink()}
    for name in names:
        if name not in there:
            raise CourseError(
                f"“{name}” 不是上面列出的名称：这里只删除运行目录里的东西，请从列表里照抄。"
            )
    paths = [there[name] for name in dict.fromkeys(names)]
    for path in paths:
        if not really:
            print(f"将会删除：{name_and_size(path)}")
            continue
        with writing(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"已删除：{path.name}")
    if paths and not really:
        print(
            "现在还没有删除任何东西。确定要删，就把 really=False 改成 really=True，再运行这一格。"
        )


def name_and_size(path: Path) -> str:
    """``name（x.xx MiB）`` of a file or of all that a folder holds."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{path.name}（{sum(file.stat().st_size for file in files) / 2**20:.2f} MiB）"
