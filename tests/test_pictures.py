"""The pictures: each made by a script, used, small and described. None of this needs a browser."""

import re
import sys

import nbformat
from conftest import NOTEBOOKS, ROOT

sys.path.insert(0, str(ROOT / "imgs"))

from draw import FOUR_ANSWERS, SKETCHES
from take import PICTURES

IMGS = ROOT / "imgs"
MADE = {f"{name}.svg" for name in (*SKETCHES, *FOUR_ANSWERS)} | {f"{name}.png" for name in PICTURES}
MADE |= {"bench_step.svg"}  # tests/benchmarks/report.py
PAGES = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("README*.md")} | {
    path: "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for path in NOTEBOOKS.glob("0*.ipynb")
}
USED = [  # (page, what the picture is said to show, its file)
    (path, alt, (path.parent / target).resolve())
    for path, text in PAGES.items()
    for alt, target in re.findall(r"!\[(.*?)\]\((?!https?:)(.*?)\)", text)
    + [(a, t) for t, a in re.findall(r'<img[^>]* src="(?!https?:)(.*?)"[^>]* alt="(.*?)"', text)]
]


def test_every_picture_named_is_made_by_a_script_and_every_one_made_is_used():
    named = {file.relative_to(IMGS).as_posix() for _, _, file in USED}
    assert named - MADE == set(), "named, and made by no script"
    assert MADE - named == set(), "made, and used nowhere"
    assert {path.name for path in IMGS.iterdir() if path.suffix in (".png", ".svg")} == MADE
    report = ROOT / "tests" / "benchmarks" / "report.py"
    assert "bench_step.svg" in report.read_text(encoding="utf-8")


def test_a_picture_says_what_to_see():
    for path, alt, file in USED:
        assert len(alt) >= 6, (path.name, file.name)


def test_pictures_are_small():
    for name in MADE:
        assert (IMGS / name).stat().st_size <= 150_000, name


def test_a_sketch_is_what_the_script_draws_and_says_that_it_is_one():
    for name, picture in SKETCHES.items():
        assert (IMGS / f"{name}.svg").read_text(encoding="utf-8") == picture
        assert "示意图" in picture
