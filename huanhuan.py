"""So that ``python -m huanhuan`` and ``import huanhuan`` work in the project's own folder too."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "notebooks"))  # where the helper lies
if __name__ == "__main__":
    runpy.run_module("huanhuan", run_name="__main__")
else:
    del sys.modules[__name__]
    import huanhuan  # noqa: F401
