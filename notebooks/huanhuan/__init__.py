"""The helper of the five notebooks: what they use and do not teach."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path

# Announcements between libraries about their own next major version; nothing a learner could mend.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")
# It asks for a package that nobody here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

NOTEBOOKS = Path(__file__).resolve().parent.parent
DATA = NOTEBOOKS.parent / "data"


class CourseError(Exception):
    """Something the learner can mend. Jupyter shows its message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook
        return [f"⛔ {self}"]


def _no_bars() -> None:
    """The libraries' progress bars off: English, and at 0 % for ever in an executed copy.

    (modelscope's, for the download, are its own and stay.)
    """
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if datasets := sys.modules.get("datasets"):  # imported before the helper
        datasets.disable_progress_bars()
    if logging := sys.modules.get("transformers.utils.logging"):
        logging.disable_progress_bar()


def _settle_paths() -> None:
    """Make relative paths in ``HUANHUAN_*`` absolute: a notebook does not run where it was called.

    They are looked for from the project's root, where ``make`` is called, then from the current
    directory. What is found in neither (a hub id, a wrong path) is left as it is. Quotes and blanks
    around a value, as some shells leave them there, are no part of it.
    """
    for name in ("HUANHUAN_DATA", "HUANHUAN_MODEL", "HUANHUAN_PERSONA", "HUANHUAN_OUTPUT"):
        given = os.environ.get(name, "")
        value = given.strip().strip("\"'“”").strip()
        if value != given:
            print(f"环境变量 {name} 两边的引号和空白不算在内，用的是：{value}")
        value = os.path.expanduser(value)
        places = [place / value for place in (NOTEBOOKS.parent, Path.cwd())]
        if name == "HUANHUAN_OUTPUT" and value:
            value = str(places[0].resolve())
        elif value and (found := [place for place in places if place.exists()]):
            value = str(found[0].resolve())
        if given:
            os.environ[name] = value


def _explain_missing_names() -> None:
    """In a notebook a NameError becomes a sentence, which names the cell to run where that is known."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def explain(shell, kind, error, trace, tb_offset=None):
        made = (
            rf"^{error.name}\b[^=\n]*=[^=]|^def {error.name}\b|^(from .*)?import .*\b{error.name}\b"
        )
        cells = [code for code in shell.user_ns.get("In", [])[:-1] if re.search(made, code, re.M)]
        known = f"（开头是 `{cells[-1].strip().splitlines()[0]}` 的那一格）" if cells else ""
        said = [
            f"⛔ 这里要用 {error.name}，可是现在没有它：名字写错了，或者内核重启过，或者后面的格子已经把它"
            f"放掉了。请先运行定义它的那一格{known}；或者选中这一格，点菜单 运行 → 运行选中单元格上方的所有单元格 / Run → Run All Above Selected Cell。"
        ]
        shell._showtraceback(kind, error, said)
        return said

    shell.set_custom_exc((NameError,), explain)


for _bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_bars, "1")  # English, and gone in a moment; transformers heeds the first
_no_bars()
_settle_paths()
_explain_missing_names()
