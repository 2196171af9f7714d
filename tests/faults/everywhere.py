"""Every write of a run fails once, and once the run is killed before it: does the next run end alike?

    python tests/faults/everywhere.py [--books 01_setup …] [--every K] [--out FILE.json]

Notebooks 01 to 04 run on 48 rows, cell by cell, each in a process of its own. What a notebook does to
files in the run directory (open to write, make a folder, rename, remove; torch's, safetensors' and
pyarrow's own writing) is counted. Then, for every K-th of them: the notebook runs again from the same
start, and that one fails as on a full disk, which must end in one sentence; or the process is killed
just before it. After that the notebook runs once more, undisturbed. The adapter's bytes, losses,
answers and pack must be those of the run that nothing struck.
"""

import argparse
import collections
import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
BOOKS = ("01_setup", "02_preprocess", "03_train_lora", "04_infer")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def persona(folder: Path) -> Path:
    """A persona of 48 rows and a few questions, who is trained for one epoch, a checkpoint a step."""
    rows = json.loads((ROOT / "data" / "huanhuan_sample.json").read_text("utf-8"))[:48]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    questions = {"known": ["你是谁？"], "identity": ["你叫什么？"], "daily": ["吃了吗？", "冷不冷？"],
                 "general": [{"question": "一加一等于几？", "expected": ["二"]}]}  # fmt: skip
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    (folder / "me.json").write_text(json.dumps({
        "name": "甄嬛", "system_prompt": "现在你要扮演甄嬛", "called": ["甄嬛"], "dataset": "rows.json",
        "questions": "questions.json", "profile": {"epochs": 1, "save_steps": 1},
    }), encoding="utf-8")  # fmt: skip
    return folder / "me.json"


def cells(book: str) -> list[str]:
    """The code that a run of the notebook as a program has."""
    content = json.loads((NOTEBOOKS / f"{book}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in content if cell["cell_type"] == "code"]
    return [
        "".join(cell["source"])
        for cell in code
        if "notebook-only" not in cell["metadata"].get("tags", [])
    ]


class Writes:
    """Counts what is done to files under `folder`, and strikes at the `at`-th, if there is one."""

    def __init__(self, folder: Path, at: int | None, kill: bool):
        self.folder, self.at, self.kill, self.count, self.kinds = str(folder), at, kill, 0, []
        sys.addaudithook(self.hear)
        import peft.peft_model
        import pyarrow
        import torch

        self.wrap(torch, "save", 1)
        self.wrap(peft.peft_model, "safe_save_file", 1)
        self.wrap(pyarrow, "OSFile", 0)

    def wrap(self, module, name: str, place: int) -> None:
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            if len(args) > place and isinstance(args[place], str | os.PathLike):
                self.seen(name, args[place])
            return real(*args, **kwargs)

        setattr(module, name, wrapped)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else 0
            if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike):
            self.seen(event, path)

    def seen(self, event: str, path) -> None:
        path = os.fsdecode(path)
        if not path.startswith(self.folder):
            return
        self.count += 1
        self.kinds.append(f"{event} {path.removeprefix(self.folder)}")
        if self.count == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(
    book: str, folder: Path, at: int | None = None, kill: bool = False
) -> tuple[str, str, list]:
    """Run a notebook in `folder`: how it ended (完成, 一句话, 报错, 被杀), what it said last, its writes."""
    said, listed = folder.with_name("said.txt"), folder.with_name("writes.json")
    listed.unlink(missing_ok=True)
    child = os.fork()  # everything is imported, and torch has computed nothing yet
    if not child:
        code, out = 0, said.open("w", encoding="utf-8")
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        os.environ["HUANHUAN_OUTPUT"] = str(folder)
        from huanhuan import CourseError

        watch, names = Writes(folder, at, kill), {"__name__": "__main__"}
        try:
            for cell in cells(book):
                exec(cell, names)
        except CourseError as error:
            print("\n⛔", str(error).replace("\n", " "), flush=True)
            code = 3
        except BaseException:
            traceback.print_exc()
            code = 4
        watch.at = None
        listed.write_text(json.dumps(watch.kinds), encoding="utf-8")
        sys.stdout.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    ended = (
        "被杀"
        if os.WIFSIGNALED(status)
        else {0: "完成", 3: "一句话"}.get(os.WEXITSTATUS(status), "报错")
    )
    lines = said.read_text(encoding="utf-8").strip().splitlines() or [""]
    told = lines[-1] if ended != "报错" else "\n".join(lines[-8:])
    return ended, told, json.loads(listed.read_text("utf-8")) if listed.exists() else []


def result(folder: Path) -> dict:
    """What a run has come to: bytes of the adapter and the answers, losses, members of the pack."""
    found = {}
    for name in ("llama3_lora/adapter_model.safetensors", "answers.json", "gguf/Modelfile"):
        file = folder / name
        if file.exists():
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("tokenized", "llama3_lora"):
        file = folder / name / "made.json"
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            found[name] = {part: record[part] for part in ("of", "settings", "results")}
    if (folder / "llama3_lora.zip").exists():
        with zipfile.ZipFile(folder / "llama3_lora.zip") as packed:
            found["pack"] = {
                n: hashlib.sha256(packed.read(n)).hexdigest() for n in packed.namelist()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--books", nargs="+", default=BOOKS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    out = asked.out and asked.out.absolute()  # the notebooks run in a folder of their own
    found, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ |= {"HUANHUAN_PROFILE": "cpu-tiny", "HUANHUAN_PERSONA": str(persona(folder))}
        os.environ |= {"HUANHUAN_OUTPUT": str(folder / "run"), "MPLBACKEND": "agg"}
        os.chdir(NOTEBOOKS)
        sys.path.insert(0, str(NOTEBOOKS))
        for room in ("cleanup", "infer", "preprocess", "setup", "show", "train"):
            importlib.import_module(f"huanhuan.{room}")

        place = folder / "run"
        place.mkdir()
        for number, book in enumerate(BOOKS):
            start = folder / f"before-{book}"
            shutil.copytree(place, start)
            ended, told, writes = run(book, place)
            if ended != "完成":
                sys.exit(f"{book}: {told}")
            expected = result(place)
            if book not in asked.books:
                continue
            counts, begun = collections.Counter(writes=len(writes)), time.time()
            for at in range(1 + number % asked.every, len(writes) + 1, asked.every):
                for kill in (False, True):
                    if not kill and writes[at - 1].startswith(("os.remove", "os.rmdir")):
                        continue  # nothing is written
                    shutil.rmtree(place)
                    shutil.copytree(start, place)
                    struck, said, _ = run(book, place, at, kill)
                    again, told, _ = run(book, place)
                    same = again == "完成" and result(place) == expected
                    counts["struck"] += 1
                    counts["killed" if kill else "failed"] += 1
                    counts["recovered"] += same
                    counts["a sentence"] += struck == "一句话"
                    counts["went on"] += struck == "完成"
                    if not same or struck == "报错":
                        wrong.append([book, at, writes[at - 1], kill, struck, said, again, told])
                        print(*wrong[-1], sep=" | ", flush=True)
            counts["seconds"] = round(time.time() - begun)
            found[book] = dict(counts)
            print(book, found[book], flush=True)
            shutil.rmtree(place)
            shutil.copytree(start, place)
            run(book, place)
    if out:  # of the notebooks that were not asked for, what was found before stands
        before = json.loads(out.read_text("utf-8")) if out.exists() else {}
        out.write_text(json.dumps(before | found, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
