"""Take the course's pictures of JupyterLab: ``python imgs/take.py [run directory]``.

A real JupyterLab is started on a copy of the project that holds the results of a finished ``make
course`` (by default ``notebooks/output/cpu-tiny``), driven with headless Chromium, and shot. The
clicks, the upload, the download and the run at home are done, not drawn; only the orange frames
and numbers are laid over the page. Needs what the course does not:
``pip install playwright jupyterlab-language-pack-zh-CN`` and, from Debian, ``chromium
fonts-noto-cjk fonts-noto-color-emoji``.
"""

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

IMGS = Path(__file__).resolve().parent
ROOT = IMGS.parent
PICTURES = [
    "ui_1_2_create_notebook", "ui_1_3_rename", "ui_1_3_add_cell", "ui_1_4_upload_dataset", "ui_1_4_upload_answer",
    "ui_1_4_3_result", "ui_1_4_4_answer", "ui_2_download_adapter", "ui_2_own_disk", "ui_2_run_locally",
]  # fmt: skip
WIDTH, HEIGHT = 1120, 600
SIDEBAR = 361  # wide enough for the longest file name of the course

# A learner's environment has no jupytext and no bitsandbytes, which the tests bring: their menu
# entries and their messages stay out.
NO_TEST_TOOLS = {
    "CONFIG/labconfig/page_config.json": '{"disabledExtensions": {"jupyterlab-jupytext": true}}',
    "IPYTHON/profile_default/startup/0.py": "import sys; sys.modules['bitsandbytes'] = None",
}

# What is laid over the page: frames with a number at their left upper corner.
MARKS = """boxes => {
  document.querySelectorAll('.take-mark').forEach(mark => mark.remove());
  boxes.forEach(([x, y, width, height], i) => document.body.insertAdjacentHTML('beforeend',
    `<div class="take-mark" style="position:fixed; z-index:99999; pointer-events:none;
       left:${x - 2}px; top:${y - 2}px; width:${width + 4}px; height:${height + 4}px;
       box-sizing:border-box; border:3px solid #d55e00; border-radius:7px">
     <b style="position:absolute; left:-19px; top:-19px; width:25px; border-radius:50%; text-align:center;
       background:#d55e00; color:white; font:bold 16px/25px sans-serif">${i + 1}</b></div>`));
}"""

# The cell that holds the words: made the active one and run where asked, or what is above it first.
CELL = """async ([words, run]) => {
  const panel = jupyterapp.shell.currentWidget, book = panel.content;
  await panel.context.ready; await panel.revealed;
  const index = book.widgets.findIndex(
    cell => cell.model.type === 'code' && (cell.model.sharedModel.source.includes(words) ||
      (cell.model.getMetadata('tags') ?? []).includes(words)));
  if (index < 0) throw new Error('no cell holds ' + words);
  book.activeCellIndex = index; book.deselectAll(); book.mode = 'command';
  if (run) {
    await panel.sessionContext.ready; await panel.sessionContext.session.kernel.info;
    if (run === 'above') await jupyterapp.commands.execute('notebook:run-all-above');
    book.activeCellIndex = index;
    await jupyterapp.commands.execute('notebook:run-cell');
  }
  const outputs = book.widgets[index].model.outputs.toJSON();
  if (!run && !outputs.length) throw new Error('the run holds no output of the cell with ' + words);
  if (outputs.some(output => JSON.stringify(output).includes('⛔')))
    throw new Error(JSON.stringify(outputs));
  await book.scrollToItem(index, 'start');
}"""
PLACE = """(cell, above) => {
  const window = cell.closest('.jp-WindowedPanel-outer');
  window.scrollTop += cell.getBoundingClientRect().top - window.getBoundingClientRect().top - above;
}"""


def around(boxes: list[dict], lowest: int) -> list[float]:
    """x, y, width and height of the smallest box that holds the boxes; it ends at `lowest`."""
    x, y = (min(box[side] for box in boxes) for side in "xy")
    right = max(box["x"] + box["width"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    return [x, y, right - x, min(bottom, lowest) - y]


class Lab:
    """A page of JupyterLab, and what a learner does there."""

    def __init__(self, page):
        self.page = page

    def command(self, name: str, **arguments) -> None:
        call = "([name, args]) => jupyterapp.commands.execute(name, args).then(() => null)"
        self.page.evaluate(call, [name, arguments])

    def open(self, path: str) -> None:
        """A document, with the file browser in its folder."""
        self.folder(str(Path(path).parent))
        self.command("docmanager:open", path=path)
        self.page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
        self.alone()
        self.page.wait_for_timeout(1500)  # until the last of its outputs is drawn

    def alone(self) -> None:
        """Close every other tab."""
        self.page.evaluate("""[...jupyterapp.shell.widgets('main')].forEach(
            tab => tab === jupyterapp.shell.currentWidget || tab.dispose())""")

    def size(self, width: int, height: int) -> None:
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.wait_for_timeout(500)

    def folder(self, path: str) -> None:
        self.command("filebrowser:go-to-path", path=path)
        self.page.wait_for_timeout(500)

    def file(self, name: str):
        """Its row in the file browser."""
        return self.page.locator(".jp-DirListing-item", has_text=name).first

    def menu(self, name: str, entry: str):
        """The entry of the menu behind the right mouse button on a file."""
        self.file(name).click()
        box = self.file(name).bounding_box()
        self.file(name).click(button="right", position={"x": box["width"] - 6, "y": 20})
        return self.page.locator(f'.lm-Menu-item[data-command="{entry}"]').first

    def cell(self, words: str, above: int = 8, run: bool | str = False):
        """The first code cell that holds `words`, or has that tag, `above` pixels below the top."""
        self.page.evaluate(CELL, [words, run])
        cell = self.page.locator(".jp-Notebook .jp-Cell.jp-mod-active")
        for _ in range(2):  # what is drawn on the way moves it
            self.page.wait_for_timeout(500)
            cell.evaluate(PLACE, above)
        return cell

    def shoot(self, name: str, *targets) -> None:
        """Write ``imgs/NAME.png`` with the numbers 1, 2 … on the targets."""
        from PIL import Image

        self.page.mouse.move(3, HEIGHT / 2)  # no tooltip, no hovering
        self.page.wait_for_timeout(500)
        # a target is an element, or several: then the frame is around them all
        boxes = [[part.bounding_box() for part in t.all() if part.is_visible()] for t in targets]
        lowest = self.page.viewport_size["height"] - 36  # the line of the status at the bottom
        self.page.evaluate(MARKS, [around(several, lowest) for several in boxes])
        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        target = IMGS / f"{name}.png"
        shot.quantize(96, dither=Image.Dither.NONE).save(target, optimize=True)
        self.page.evaluate(MARKS, [])
        self.page.keyboard.press("Escape")
        print(f"{target.stat().st_size / 1000:5.0f} kB  {target.name}")


@contextlib.contextmanager
def lab(folder: Path, beside: Path, **environment: str) -> Iterator[Lab]:
    """JupyterLab on `folder`, in Chinese as ``make lab`` starts it; its own files lie in `beside`."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    for file, text in NO_TEST_TOOLS.items():
        (beside / file).parent.mkdir(parents=True, exist_ok=True)
        (beside / file).write_text(text, encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if not name.startswith("HUANHUAN_")}
    own |= {f"JUPYTER_{kind}_DIR": str(beside / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": str(beside / "IPYTHON"), "JUPYTER_TOKEN": token}
    own |= {"PS1": "$ "} | environment  # a prompt that names no machine and no user
    settings = "--ServerApp.terminado_settings={'shell_command': ['bash', '--norc', '--noprofile']}"
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
         "--ServerApp.port_retries=0", "--notebook-dir=.", "--expose-app-in-browser", settings,
         f"--LabApp.app_settings_dir={ROOT / '.jupyter'}"],
        cwd=folder, env=own, stdout=(beside / "lab.log").open("a"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(240):
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/api?token={token}").close()
                break
            time.sleep(0.25)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu", "--disable-3d-apis"],
            )
            page = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5, locale="zh-CN"
            )
            page.goto(f"http://127.0.0.1:{port}/lab?token={token}")
            page.wait_for_selector(".jp-LauncherCard")
            handle = page.locator("#jp-main-split-panel > .lm-SplitPanel-handle").first
            handle.drag_to(
                page.locator("#jp-main-split-panel"),
                target_position={"x": SIDEBAR, "y": 300},
                force=True,
            )
            yield Lab(page)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def prepare(run: Path, project: Path, data: Path) -> Path:
    """A copy of the project as a learner has it after 04, in `project`; returns its run directory."""
    from nbformat import read, write
    from nbformat.sign import NotebookNotary

    unwanted = shutil.ignore_patterns(".*", "__pycache__", "output", "tests")
    shutil.copytree(ROOT, project, ignore=unwanted)
    profile = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["profile"]["name"]
    results = project / "notebooks" / "output" / profile
    shutil.copytree(run, results, ignore=shutil.ignore_patterns("executed", "local", "uploads"))
    data.mkdir()
    notary = NotebookNotary(data_dir=str(data))  # JupyterLab shows the pictures of a trusted one
    for path in (project / "notebooks").glob("0[34]_*.ipynb"):
        book, executed = (read(p, as_version=4) for p in (path, run / "executed" / path.name))
        known = {(cell.id, cell.source): cell for cell in executed.cells}
        for cell in book.cells:
            ran = known.get((cell.id, cell.source))
            if ran and cell.cell_type == "code":
                cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
        write(book, path)
        text = path.read_text(encoding="utf-8").replace(str(run), str(results))
        path.write_text(text, encoding="utf-8")
        notary.sign(read(path, as_version=4))
    return results


def take_the_course(run: Path, work: Path, home: Path) -> None:
    """The pictures up to the download, which lands in `home`."""
    project = work / "huanhuan-course"
    results = prepare(run, project, work / "DATA")
    inside = results.relative_to(project).as_posix()
    with lab(project, work, HUANHUAN_PROFILE=results.name) as jupyter:
        page = jupyter.page
        jupyter.folder("notebooks")
        new = page.locator('.jp-FileBrowser [data-jp-item-name="new-launcher"]')
        jupyter.shoot("ui_1_2_create_notebook", new, page.locator(".jp-LauncherCard").first)

        jupyter.open("notebooks/01_setup.ipynb")
        jupyter.file("01_setup.ipynb").click()
        jupyter.command("filebrowser:duplicate")
        copy = jupyter.file("01_setup-Copy1.ipynb")
        copy.wait_for()
        entry = jupyter.menu("01_setup-Copy1.ipynb", "filebrowser:rename")
        jupyter.shoot("ui_1_3_rename", copy, entry)
        (project / "notebooks" / "01_setup-Copy1.ipynb").unlink()

        jupyter.cell("", run=True)
        plus, play = (
            page.locator(f'.jp-NotebookPanel-toolbar [data-jp-item-name="{name}"]')
            for name in ("insert", "run")
        )
        plus.click()
        page.keyboard.press("Enter")
        page.keyboard.type('print("你好")')
        play.click()
        page.wait_for_timeout(1000)
        new = page.locator(".jp-Notebook .jp-CodeCell", has_text="你好").last
        new.evaluate("cell => cell.scrollIntoView({block: 'center'})")
        jupyter.shoot("ui_1_3_add_cell", plus, new, play)

        cell = jupyter.cell("show.file_picker", 120, run="above")
        button = cell.locator("button.jupyter-button")
        jupyter.shoot("ui_1_4_upload_dataset", button)
        rows = json.loads((ROOT / "data" / "huanhuan_sample.json").read_text(encoding="utf-8"))
        rows = [row for row in rows if "history" not in row][:40]
        mine = work / "我的数据.json"
        mine.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        with page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(mine)
        cell.get_by_text("收到").wait_for()
        jupyter.shoot("ui_1_4_upload_answer", button, cell.locator(".widget-html").last)

        jupyter.open("notebooks/03_train_lora.ipynb")
        jupyter.folder(f"{inside}/llama3_lora")
        jupyter.size(1280, 880)
        saved = jupyter.cell("tutorial-1.4.2-save", 450).locator(".jp-OutputArea-output")
        weights = jupyter.file("adapter_model.safetensors")
        jupyter.shoot("ui_1_4_3_result", page.locator(".jp-FileBrowser-crumbs"), weights, saved)

        jupyter.open("notebooks/04_infer.ipynb")
        jupyter.command("application:toggle-left-area")
        jupyter.size(WIDTH, 870)
        table = jupyter.cell("infer.four_answers(").locator("table")
        sides = [table.locator(f"tr > :nth-child({n}), tr > :nth-child({n + 1})") for n in (2, 4)]
        jupyter.shoot("ui_1_4_4_answer", *sides)
        jupyter.command("application:toggle-left-area")

        jupyter.size(WIDTH, HEIGHT)
        jupyter.cell("tutorial-2-download-adapter")
        jupyter.folder(inside)
        entry = jupyter.menu("llama3_lora.zip", "filebrowser:download")
        jupyter.shoot("ui_2_download_adapter", jupyter.file("llama3_lora.zip"), entry)
        entry = jupyter.menu("llama3_lora.zip", "filebrowser:download")
        with page.expect_download() as download:
            entry.click()
        download.value.save_as(home / "llama3_lora.zip")


def take_it_home(work: Path, home: Path) -> None:
    """The pictures on one's own computer: a folder with nothing but the zip and the base model."""
    from nbformat import write
    from nbformat.v4 import new_code_cell, new_notebook

    # a warning names folders of this machine
    with lab(home, work, PYTHONWARNINGS="ignore") as jupyter:
        page = jupyter.page
        jupyter.command("terminal:create-new")
        jupyter.alone()
        jupyter.size(WIDTH, 480)
        screen = page.locator(".jp-Terminal .xterm-screen")
        screen.click()
        for line in ("", "python -m zipfile -e llama3_lora.zip .", "ls -sh1 llama3_lora"):
            page.wait_for_timeout(1500)
            page.keyboard.type(f"{line}\n" if line else "")
        page.wait_for_timeout(1500)
        jupyter.command("filebrowser:refresh")
        files = [jupyter.file(name) for name in ("llama3_lora.zip", "llama3_lora")]
        jupyter.shoot("ui_2_own_disk", *files, screen)

        card = (home / "llama3_lora" / "README.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(.+?)\n```", card, re.S).group(1)
        cells = [new_code_cell(part) for part in code.split("\n\n", 1)]  # the two paths, the rest
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
        write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), home / "问问她.ipynb")
        jupyter.open("问问她.ipynb")
        jupyter.size(WIDTH, 720)
        cell = jupyter.cell("from_pretrained(", 90, run="above")
        paths = page.locator(".jp-Notebook .jp-Cell").first
        jupyter.shoot("ui_2_run_locally", paths, cell.locator(".jp-OutputArea-output"))


if __name__ == "__main__":
    run = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "notebooks/output/cpu-tiny").resolve()
    with tempfile.TemporaryDirectory() as work:
        home = Path(work) / "home"
        home.mkdir()
        model = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["files"]["model"]
        shutil.copytree(model, home / Path(model).name)
        take_the_course(run, Path(work), home)
        take_it_home(Path(work), home)
