"""Every fault of tests/faults/faults.py strikes a run of its own."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "faults"))
from faults import FAULTS, make_run, strike


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUANHUAN_OUTPUT", str(folder))
        make_run(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_fault_is_a_sentence_or_nothing_and_loses_nothing(fault, whole, tmp_path):
    strike(fault, whole, tmp_path)


def test_the_matrix_is_long_enough_and_its_table_is_of_these_faults():
    assert len({fault.kind for fault in FAULTS}) == len(FAULTS) >= 60
    table = (ROOT / "tests" / "faults" / "README.md").read_text(encoding="utf-8")
    kinds = [
        line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " | " in line
    ]
    assert kinds[1:] == [fault.kind.replace("|", " ") for fault in FAULTS]


def test_the_readme_says_what_everywhere_found():
    found = json.loads((ROOT / "tests" / "faults" / "everywhere.json").read_text("utf-8"))
    assert [*found] == ["01_setup", "02_preprocess", "03_train_lora", "04_infer"]
    whole = {name: sum(book[name] for book in found.values()) for name in found["04_infer"]}
    assert whole["recovered"] == whole["struck"] == whole["failed"] + whole["killed"]
    said = "一共 {writes} 次写，让 {failed} 次失败、在 {killed} 次之前杀掉，{recovered} 次都恢复成一样的结果"
    assert said.format_map(whole) in (ROOT / "README.md").read_text(encoding="utf-8")
