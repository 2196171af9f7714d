import json

import pandas as pd
import pytest

from huanhuan.preprocess import DatasetError, load_rows, split_by_instruction

GOOD = {"instruction": "你好", "input": "", "output": "你好。"}


def write(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize(
    ("content", "row", "field", "says"),
    [
        ("", 0, "", "空的"),
        ("   \n", 0, "", "空的"),
        ("你好", 0, "", "JSON"),
        ('[{"instruction": "a", "output": "b"},]', 0, "", "第 1 行"),
        ({"instruction": "a"}, 0, "", "数组"),
        ([], 0, "", "一条对话也没有"),
        ([GOOD, "你好"], 2, "", "应当是"),
        ([GOOD, {"instruction": "a", "input": ""}], 2, "output", "缺少"),
        ([{"input": "", "output": "a"}], 1, "instruction", "缺少"),
        ([GOOD, GOOD, GOOD | {"output": None}], 3, "output", "null"),
        ([GOOD | {"instruction": 7}], 1, "instruction", "7"),
        ([GOOD | {"input": ["a"]}], 1, "input", "文字"),
        ([GOOD | {"output": "  "}], 1, "output", "空的"),
        ([GOOD | {"instruction": ""}], 1, "instruction", "空的"),
    ],
)
def test_bad_dataset_is_refused_with_row_and_field(tmp_path, content, row, field, says):
    with pytest.raises(DatasetError) as caught:
        load_rows(write(tmp_path, content))
    (problem,) = caught.value.problems
    assert problem[:2] == (row, field)
    assert says in problem[2]
    message = str(caught.value)
    assert "mine.json" in message and says in message
    assert not row or f"第 {row} 条" in message


def test_every_problem_is_listed_twenty_are_shown(tmp_path):
    with pytest.raises(DatasetError) as caught:
        load_rows(write(tmp_path, [{"instruction": "a"}] * 25))
    assert len(caught.value.problems) == 25
    assert (
        "第 20 条" in str(caught.value)
        and "第 21 条" not in str(caught.value)
        and "还有 5 处" in str(caught.value)
    )


def test_missing_file(tmp_path):
    with pytest.raises(DatasetError, match="打不开"):
        load_rows(tmp_path / "nowhere.json")


def test_texts_come_back_as_written(tmp_path):
    rows = [
        {"instruction": "007", "output": " 有空格 "},
        GOOD | {"input": "材料", "source": "别的字段"},
    ]
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    table = load_rows(path)
    assert list(table.columns) == ["instruction", "input", "output"]
    assert table.to_dict("records") == [
        {"instruction": "007", "input": "", "output": " 有空格 "},
        GOOD | {"input": "材料"},
    ]
    assert list(table.index) == [1, 2]


def frame(instructions):
    return pd.DataFrame(
        {"instruction": instructions, "input": "", "output": "嗯"},
        index=range(1, len(instructions) + 1),
    )


def test_split_keeps_an_instruction_on_one_side():
    rows = frame([f"问题 {i % 40}" + " " * (i % 3) for i in range(400)])
    train, held = split_by_instruction(rows, 0.1, seed=1)
    assert not set(train["instruction"].str.strip()) & set(held["instruction"].str.strip())
    assert held["instruction"].str.strip().nunique() == 4
    assert sorted([*train.index, *held.index]) == list(rows.index)
    assert list(train.index) == sorted(train.index)
    same = split_by_instruction(rows, 0.1, seed=1)[1]
    other = split_by_instruction(rows, 0.1, seed=2)[1]
    assert list(same.index) == list(held.index) != list(other.index)


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (3, 1)])
def test_split_of_very_few(count, held):
    train, eval_rows = split_by_instruction(frame([str(i) for i in range(count)]), 0.1, seed=0)
    assert (len(train), len(eval_rows)) == (count - held, held)
