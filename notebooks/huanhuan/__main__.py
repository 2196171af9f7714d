"""Run the course: ``python -m huanhuan [01_setup …]`` in ``notebooks/``.

Executes the named notebooks, or all five, in order, with one line a notebook; writes executed
copies and an HTML of each under the run directory. After all five: a report card.

``python -m huanhuan script 03_train_lora`` writes ``output/03_train_lora.py`` instead, for
torchrun: the notebook's code cells but those that only a reader needs (tag ``notebook-only``).

``python -m huanhuan doctor`` looks at the machine and at what the run has made, and says what to do next.
"""

import asyncio
import base64
import html
import json
import logging
import mimetypes
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter

from huanhuan import NOTEBOOKS, CourseError

try:
    from huanhuan.course import ARTEFACTS, Course, choose_profile, machine, versions, writing
except CourseError as error:  # a bad persona file
    sys.exit(f"⛔ {error}")


BOOKS = [*dict.fromkeys(what.made_by for what in ARTEFACTS.values()), "05_cleanup"]


# What nbclient's tasks leave behind when Ctrl-C stops them is no news to anybody.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

SILENCE = 8  # seconds after which a cell that says nothing is said to be running


class Client(NotebookClient):
    """Executes a notebook, and passes on the lines in which a long cell says how far it is ("… ")."""

    async def async_execute_cell(self, cell, cell_index, **others):
        self.began = self.said = time.monotonic()
        speaking = asyncio.create_task(self._speak(cell_index))
        try:
            return await super().async_execute_cell(cell, cell_index, **others)
        finally:
            speaking.cancel()

    async def _speak(self, number: int) -> None:
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self.said >= SILENCE:
                self._say(f"… 第 {number + 1} 格，运行了 {time.monotonic() - self.began:.0f} 秒")

    def _say(self, line: str) -> None:
        print(f"\n    {line}", end="", flush=True)
        self.said = time.monotonic()

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            for line in msg["content"]["text"].splitlines():
                if line.startswith("… "):
                    self._say(line)
        return super().process_message(msg, cell, cell_index)


def run(path: Path, out: Path) -> None:
    """Execute the notebook at `path`; leave an executed copy and an HTML of it in `out`.

    Raises CourseError where a cell fails, with its message.
    """
    notebook = nbformat.read(path, as_version=4)
    client = Client(
        notebook,
        timeout=None,  # training the 3B takes as long as it takes
        extra_arguments=["--log-level=CRITICAL"],
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    started = time.time()
    failure = None
    try:
        client.execute()
    except Exception as error:
        if hasattr(client, "_async_cleanup_kernel_future"):  # nbclient has heard Ctrl-C
            raise KeyboardInterrupt from None
        if isinstance(error, DeadKernelError):
            error = CourseError(
                f"{path.name} 的内核死了，多半是内存不够：关掉别的程序，再运行一次，训练会从存好的地方接着来；"
                "还不行，换一个小一些的模型。"
            )
        elif not isinstance(error, CellExecutionError):
            raise
        failure = error
    if out.parent.exists():  # a run that was refused at its first step leaves nothing behind
        stamp = " · ".join([
            time.strftime("%Y-%m-%d %H:%M"), machine(), *(f"{k} {v}" for k, v in versions().items()),
            f"{time.time() - started:.0f} 秒",
        ])  # fmt: skip
        note = nbformat.v4.new_markdown_cell(
            f"*这是一份运行记录：{html.escape(stamp)}*", id="run-record"
        )
        notebook.cells.insert(0, note)
        attach_pictures(notebook)
        freeze_widgets(notebook)
        try:
            with writing(out):
                out.mkdir(exist_ok=True)
                nbformat.write(notebook, out / path.name)
                body, _ = HTMLExporter().from_notebook_node(
                    notebook, {"metadata": {"name": path.stem}}
                )
                (out / f"{path.stem}.html").write_text(offline(body), encoding="utf-8")
        except CourseError as error:  # the notebook's own failure is what matters
            failure = failure or error
    if isinstance(failure, CourseError):
        raise failure
    if failure:
        if failure.ename in ("CourseError", "DatasetError"):
            raise CourseError(failure.evalue) from None
        raise CourseError(f"{path.name} 里有一格出错了：\n{failure}") from None


def attach_pictures(notebook: nbformat.NotebookNode) -> None:
    """Carry the pictures inside the notebook, so that a copy shows them wherever it lies."""
    for cell in notebook.cells:
        for link in (
            re.findall(r"\]\((\.\./imgs/[^)]+)\)", cell.source)
            if cell.cell_type == "markdown"
            else []
        ):
            picture = NOTEBOOKS / link
            kind = mimetypes.guess_type(picture)[0]
            cell.setdefault("attachments", {})[picture.name] = {
                kind: base64.b64encode(picture.read_bytes()).decode()
            }
            cell.source = cell.source.replace(link, f"attachment:{picture.name}")


WIDGET = "application/vnd.jupyter.widget-view+json"


def freeze_widgets(notebook: nbformat.NotebookNode) -> None:
    """In a copy no button works and no bar moves: a line stands for the first, the second go."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "execute_result" and WIDGET in output.data:
                output.data = {
                    "text/plain": "（这里原来是可以点的界面：自己打开笔记本运行，才会有。）"
                }
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]
    notebook.metadata.pop("widgets", None)


SOLUTION = re.compile(r'(celltag_solution.*?)(<div class="highlight.*?</pre></div>)', re.DOTALL)


def offline(page: str) -> str:
    """`page` without what would be fetched from elsewhere, readable on a telephone, solutions folded.

    Its links lead to the other pages.
    """
    style = (
        "<style>.jp-InputArea-editor{overflow-x:auto}"
        ".jp-RenderedMarkdown pre{font-family:monospace;background:#f5f5f5;overflow-x:auto}"
        ".jp-RenderedSVG img{max-width:100%;height:auto}</style>\n</head>"
    )
    page = re.sub(r'<script src="https?://[^>]*>\s*</script>', "", page)
    page = re.sub(r'(<a href="\w+)\.ipynb"', r'\1.html"', page)
    folded = r"\1<details><summary>参考答案：先自己想一想</summary>\2</details>"
    return SOLUTION.sub(folded, page).replace("</head>", style, 1)


def report(course: Course, answers: list[dict]) -> str:
    """The report card, as Markdown text."""
    from huanhuan.exercises import done  # not above: the runner itself needs no torch
    from huanhuan.infer import FOUR, plain, share

    results = course.record("adapter")["results"] | course.record("answers")["results"]
    lines = ["", f"# 成绩单（{course.profile.name}，{machine()}）", ""]
    # the question that was trained on, ordinary life, who she is and what only the data tells
    shown = [*answers[:4], *answers[-6:]]
    lines += [f"| 问题 | {' | '.join(FOUR.values())} |", "|---" * 5 + "|"]
    lines += [
        "| " + " | ".join(plain(answer[name]) for name in ("question", *FOUR)) + " |"
        for answer in shown
    ]
    before, after = results["eval_loss_before"], results["eval_loss_after"]
    lines += ["", f"验证集损失：{before:.3f} → {after:.3f}（{after / before - 1:+.0%}）", ""]
    lines += [f"| 没训练过的问法 | {' | '.join(FOUR.values())} |", "|---" * 5 + "|"]
    for label, score in (("说出自己是谁", "name"), ("知道只有数据里才有的事", "facts")):
        if f"{score}_tuned" in results:
            said = [share(*results[f"{score}_{name}"]) for name in FOUR]
            lines.append(f"| {label} | {' | '.join(said)} |")
    lines += [
        "",
        f"写满 04 的上限以前，自己停下来：{share(*results['stopped_tuned'])}",
        "",
        "| 笔记本 | 分钟 | 内存峰值 GiB |",
        "|---|---|---|",
    ]
    books = course.manifest["notebooks"]
    lines += [
        f"| {name} | {books[name]['minutes']:.1f} | {books[name]['peak_memory_gib']:.2f} |"
        for name in BOOKS
        if name in books
    ]
    solved = {name: kn for name, kn in done(course.run_dir).items() if kn[0]}
    if solved:
        lines += ["", "练习：" + "，".join(f"{name} {k} / {n}" for name, (k, n) in solved.items())]
    return "\n".join(lines) + "\n"


# All processes run every cell: each needs the model, and saving a model cut into parts needs them
# all. What only one may do (rename, write, draw) the helper leaves to the first.
SCRIPT_HEAD = """# Made from {name}.ipynb by: python -m huanhuan script {name}
import os
import sys

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), {back!r}))
sys.path.insert(0, os.getcwd())
if int(os.environ.get("RANK", 0)) > 0:
    sys.stdout = open(os.devnull, "w")  # the first process speaks for all
"""
SCRIPT_TAIL = """from accelerate import PartialState

PartialState().destroy_process_group()  # its threads may abort the process as it ends
"""


def script(path: Path) -> Path:
    """Write the program that the notebook at `path` is; returns where it lies."""
    cells = [
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and "notebook-only" not in cell.metadata.get("tags", [])
    ]
    folder = Path(os.environ.get("HUANHUAN_OUTPUT") or NOTEBOOKS / "output")
    target, back = folder / f"{path.stem}.py", os.path.relpath(NOTEBOOKS, folder)
    text = "\n\n".join([SCRIPT_HEAD.format(name=path.stem, back=back), *cells, SCRIPT_TAIL])
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return target


def main(names: list[str]) -> None:
    books = [NOTEBOOKS / f"{name}.ipynb" for name in BOOKS]
    if names == ["doctor"]:
        from huanhuan.setup import doctor

        course = Course.resume() if Course.started() else Course.start()
        for row in doctor(course).itertuples(index=False):
            print("  ".join(row))
        return
    wants_script = names[:1] == ["script"]
    names = names[wants_script:]
    unknown = set(names) - {path.stem for path in books}
    if unknown:
        raise CourseError(
            f"没有这本笔记本：{'、'.join(sorted(unknown))}，可以写的有 {'、'.join(p.stem for p in books)}。"
        )
    if wants_script:
        for path in books:
            if path.stem in names:
                print(os.path.relpath(script(path)))
        return
    started = time.time()
    print(f"档位：{'，'.join(choose_profile())}")
    out = Course.start().run_dir / "executed"
    for path in books:
        if names and path.stem not in names:
            continue
        print(f"{path.stem:<16}", end="", flush=True)
        begun = time.time()
        run(path, out)
        print(f" 完成，{time.time() - begun:.0f} 秒", flush=True)

    if names:
        return
    course = Course.resume("adapter", "answers", "pack")
    answers = json.loads(course.path("answers").read_text(encoding="utf-8"))
    card = report(course, answers)
    print(card)
    with writing(course.run_dir):
        (course.run_dir / "report.md").write_text(card, encoding="utf-8")
    print(f"共 {(time.time() - started) / 60:.1f} 分钟")
    print(f"适配器：{course.path('adapter')}")
    print(f"可以带走的压缩包：{course.path('pack')}")
    print(f"每本笔记本的运行记录（用浏览器打开 HTML）：{out}")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal's encoding may lack what an answer holds
    try:
        main(sys.argv[1:])
    except CourseError as error:
        sys.exit(f"\n⛔ {error}")
    except KeyboardInterrupt:
        sys.exit("\n⛔ 停下来了，做完的都在；再运行一次，训练会从存好的地方接着来。")
