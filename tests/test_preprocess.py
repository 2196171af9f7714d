import pandas as pd
import pytest

from huanhuan.preprocess import asks_identity, opening, split_by_instruction
from huanhuan.prompt import normalised


def frame(instructions):
    return pd.DataFrame(
        {"instruction": instructions, "input": "", "output": "嗯"},
        index=range(1, len(instructions) + 1),
    ).assign(history=[[] for _ in instructions])


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


def test_the_turns_of_a_dialogue_stay_together():
    """Every dialogue asks the same second question: what it began with tells them apart."""
    rows = frame([f"第{i // 2}件事" if i % 2 == 0 else "那后来呢？" for i in range(80)])
    rows["history"] = [[] if i % 2 == 0 else [[f"第{i // 2}件事", "嗯"]] for i in range(80)]
    assert opening(rows).nunique() == 40
    train, held = split_by_instruction(rows, 0.1, seed=1)
    assert len(held) == 8 and not set(opening(train)) & set(opening(held))


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (3, 1)])
def test_split_of_very_few(count, held):
    train, eval_rows = split_by_instruction(frame([str(i) for i in range(count)]), 0.1, seed=0)
    assert (len(train), len(eval_rows)) == (count - held, held)


def test_split_compares_questions_without_punctuation_width_and_case():
    rows = frame(["你是谁？", "你是谁", "你 是 谁?!", "ＡＢＣ", "abc。", "……", "。。。", "再见"])
    keys = rows["instruction"].map(normalised)
    assert keys.nunique() == 5
    for seed in range(20):
        train, held = split_by_instruction(rows, 0.4, seed)
        assert not set(train["instruction"].map(normalised)) & set(
            held["instruction"].map(normalised)
        )


def test_identity_questions_are_drawn_apart():
    rows = frame([f"问题 {i}" for i in range(100)])
    rows.loc[1:40, "output"] = "我是甄嬛。"
    assert list(asks_identity(rows)) == [True] * 40 + [False] * 60
    held = split_by_instruction(rows, 0.1, seed=0)[1]
    assert (asks_identity(held).sum(), len(held)) == (4, 10)
    few = rows.drop(range(4, 41))  # three ways of asking for her name: all stay in training
    assert not asks_identity(split_by_instruction(few, 0.1, seed=0)[1]).any()
