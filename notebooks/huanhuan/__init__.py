"""The helper of the five notebooks: what they use and do not teach."""

import os
import warnings
from pathlib import Path

# Announcements between libraries about their own next major version; nothing a learner could mend.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")

NOTEBOOKS = Path(__file__).resolve().parent.parent
DATA = NOTEBOOKS.parent / "data"


class CourseError(Exception):
    """Something the learner can mend. Jupyter shows its message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook
        return [f"⛔ {self}"]


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


_settle_paths()
