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
    directory. What is found in neither (a hub id, a wrong path) is left as it is.
    """
    for name in ("HUANHUAN_DATA", "HUANHUAN_MODEL", "HUANHUAN_PERSONA"):
        value = os.environ.get(name, "")
        found = [
            start / value
            for start in (NOTEBOOKS.parent, Path.cwd())
            if value and (start / value).exists()
        ]
        if found:
            os.environ[name] = str(found[0].resolve())
    if os.environ.get("HUANHUAN_OUTPUT"):
        os.environ["HUANHUAN_OUTPUT"] = str(
            (NOTEBOOKS.parent / os.environ["HUANHUAN_OUTPUT"]).resolve()
        )


_settle_paths()
