"""How long the strict reader takes, and how much memory, from ten thousand to a million rows.

    python tests/benchmarks/read_rows.py [--rows N ...]

Every file is read in a process of its own. The table is Markdown: seconds, microseconds a row, size
of the file in MB (10**6 bytes), growth of the peak memory (RSS) over the size of the file. What the
process needs at any size, some 10 MB, makes the last column large for a small file.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FORMATS = ("json", "jsonl", "csv")

# Run in the fresh process: prints seconds, growth of the peak in bytes, rows.
READ = """
import sys, time
from huanhuan.course import peak_memory_gib
from huanhuan.reader import load_rows
before, start = peak_memory_gib(), time.perf_counter()
rows = len(load_rows(sys.argv[1]))
print(time.perf_counter() - start, (peak_memory_gib() - before) * 2**30, rows)
"""


def dialogues(count: int) -> Iterator[dict[str, str]]:
    """Varied rows, about 200 bytes each as JSON; one in ten has an input."""
    chance = random.Random(count)
    characters = [chr(code) for code in range(0x4E00, 0x5A00)] + list("，。？！，。")

    def text(shortest: int, longest: int) -> str:
        return "".join(chance.choices(characters, k=chance.randint(shortest, longest)))

    for number in range(count):
        given = text(5, 20) if number % 10 == 0 else ""
        yield {"instruction": text(5, 30), "input": given, "output": text(10, 60)}


def write(path: Path, count: int) -> None:
    """Write `count` dialogues in the format that the suffix names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ["instruction", "input", "output"])
            table.writeheader()
            table.writerows(dialogues(count))
            return
        before, between, after = {".json": ("[\n", ",\n", "\n]\n"), ".jsonl": ("", "\n", "\n")}[
            path.suffix
        ]
        file.write(before)
        for number, row in enumerate(dialogues(count)):
            file.write((between if number else "") + json.dumps(row, ensure_ascii=False))
        file.write(after)


def measure(path: Path) -> tuple[float, float, int]:
    """Seconds, growth of peak memory in bytes, and rows of one reading in a fresh process."""
    environment = os.environ | {"PYTHONPATH": str(NOTEBOOKS)}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, growth, rows = done.stdout.split()
    return float(seconds), float(growth), int(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    print("| format | rows | seconds | µs/row | MB | peak growth / size |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            for count in parser.parse_args().rows:
                path = Path(folder) / f"rows.{kind}"
                write(path, count)
                seconds, growth, rows = measure(path)
                assert rows == count
                size = path.stat().st_size
                print(
                    f"| {kind} | {count} | {seconds:.2f} | {seconds / count * 1e6:.1f}"
                    f" | {size / 1e6:.1f} | {growth / size:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
