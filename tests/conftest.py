"""One run directory for the whole session: the notebooks (nbmake) fill it, the tests read it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))


def pytest_configure(config):
    for name in ("HUANHUAN_DATA", "HUANHUAN_MODEL"):
        os.environ.pop(name, None)
    os.environ["HUANHUAN_PROFILE"] = "cpu-tiny"
    config.run_folder = tempfile.TemporaryDirectory(prefix="huanhuan-")
    os.environ["HUANHUAN_OUTPUT"] = str(Path(config.run_folder.name) / "run")


def pytest_unconfigure(config):
    config.run_folder.cleanup()


def run_course(*notebooks: str, **environment: str) -> subprocess.CompletedProcess:
    """Execute the named notebooks (all five if none), each in its own kernel, with `environment` on top."""
    return subprocess.run(
        [sys.executable, "-m", "huanhuan", *notebooks],
        cwd=NOTEBOOKS, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished_run():
    """The Course of a run of all five notebooks: nbmake's, or one made now."""
    from huanhuan.course import Course, CourseError

    try:
        course = Course.resume("adapter", "answers", "pack")
    except CourseError:
        done = run_course()
        assert done.returncode == 0, done.stdout + done.stderr
        course = Course.resume("adapter", "answers", "pack")
    return course


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run directory of this test's own."""
    monkeypatch.setenv("HUANHUAN_OUTPUT", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama")
