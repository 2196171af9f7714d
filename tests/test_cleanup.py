import gc

import pytest
import torch

from huanhuan import cleanup
from huanhuan.course import Course, CourseError


def test_memory_counts_each_storage_once_and_lets_go():
    gc.collect()
    before = cleanup.memory()["tensors"]
    block = torch.zeros(1024, 1024)
    view = block[:10]
    assert cleanup.memory()["tensors"] - before == pytest.approx(4, abs=0.01)
    del block
    assert cleanup.memory()["tensors"] - before == pytest.approx(4, abs=0.01)
    del view
    assert cleanup.memory()["tensors"] - before == pytest.approx(0, abs=0.01)


@pytest.fixture
def course(run_dir):
    for name in ("checkpoints", "llama3_lora"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "file").write_bytes(b"x" * 2**20)
    (run_dir / "answers.json").write_text("{}")
    return Course.start()


def test_everything_is_listed_with_its_size(course):
    table = cleanup.on_disk(course)
    assert dict(zip(table["名称"], table["MiB"], strict=True)) == {
        "checkpoints": 1.0,
        "llama3_lora": 1.0,
        "answers.json": 0.0,
    }


def test_removes_only_when_asked_to(course, run_dir, capsys):
    cleanup.remove(course, ["checkpoints", "answers.json"])
    assert (run_dir / "checkpoints").exists() and "还没有删除" in capsys.readouterr().out
    cleanup.remove(course, ["checkpoints", "answers.json"], really=True)
    assert sorted(path.name for path in run_dir.iterdir()) == ["llama3_lora"]


@pytest.mark.parametrize(
    "name", ["../outside", "..", ".", "", "llama3_lora/file", "link", "nowhere"]
)
def test_nothing_outside_the_run_directory_is_ever_removed(course, run_dir, name):
    outside = run_dir.parent / "outside"
    outside.mkdir()
    (run_dir / "link").symlink_to(outside)
    with pytest.raises(CourseError):
        cleanup.remove(course, ["checkpoints", name], really=True)
    assert outside.exists() and (run_dir / "checkpoints").exists()
