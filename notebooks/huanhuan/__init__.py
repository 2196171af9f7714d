"""The helper of the five notebooks: what they use and do not teach."""

import errno
import json
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


def read_json(path: Path) -> dict:
    """The object that the JSON file `path` holds, with a byte order mark or without.

    Raises OSError where there is no such file (to read a pipe might take for ever), ValueError for
    whatever is wrong with it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, "没有这个文件", str(path))
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("括号套得太深") from None
    if not isinstance(content, dict):
        raise ValueError("最外层应当是对象 {…}")
    return content


def bare(value: str) -> str:
    """A value as people copy it, without the quotes and blanks around it."""
    return value.strip().strip("\"'“”").strip()


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
    for name in ("PROFILE", "DATA", "MODEL", "PERSONA", "OUTPUT"):
        name = f"HUANHUAN_{name}"
        given = os.environ.get(name, "")
        value = bare(given)
        if value != given:
            print(f"环境变量 {name} 两边的引号和空白不算在内，用的是：{value}")
        if value and name != "HUANHUAN_PROFILE":
            value = os.path.expanduser(value)
            # os.path's, unlike pathlib's, hold for names too long, and links that lead to themselves.
            places = [os.path.realpath(place / value) for place in (NOTEBOOKS.parent, Path.cwd())]
            found = [place for place in places if os.path.exists(place)]
            value = places[0] if name == "HUANHUAN_OUTPUT" else [*found, value][0]
        if given:
            os.environ[name] = value


def _explain_errors() -> None:
    """In a notebook ■ and a NameError become a sentence, which names the cell to run where that is known."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def explain(shell, kind, error, trace, tb_offset=None):
        if kind is KeyboardInterrupt:
            said = ["⛔ 停下了，这一格没有做完；再运行它，就从这一格的开头来。"]
            shell._showtraceback(kind, error, said)
            return said
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

    shell.set_custom_exc((NameError, KeyboardInterrupt), explain)


for _bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_bars, "1")  # English, and gone in a moment; transformers heeds the first
_no_bars()
_settle_paths()
_explain_errors()
