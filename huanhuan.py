"""So that ``python -m huanhuan`` works in the project's own folder too: the helper lies in notebooks/."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "notebooks"))
    runpy.run_module("huanhuan", run_name="__main__")
