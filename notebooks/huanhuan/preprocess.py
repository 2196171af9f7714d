"""Room 02: read, check and split a dataset."""

import json
import random
import re
import unicodedata
from pathlib import Path

import pandas as pd

from huanhuan.course import CourseError
from huanhuan.prompt import NAME

FIELDS = ("instruction", "input", "output")
SHOWN = 20  # problems listed in a message; the rest are counted


class DatasetError(CourseError):
    """A dataset that cannot be used.

    `problems` lists ``(row, field, message)``; rows count from 1, row 0 is the file as a whole.
    """

    def __init__(self, path: Path, problems: list[tuple[int, str, str]]):
        self.problems = problems
        lines = []
        for row, field, message in problems[:SHOWN]:
            where = "".join([f"第 {row} 条" if row else "", f"的 {field}" if field else ""])
            lines.append(f"{where}：{message}" if where else message)
        if len(problems) > SHOWN:
            lines.append(f"……另外还有 {len(problems) - SHOWN} 处问题")
        body = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)
        super().__init__(f"数据集 {path.name} 用不了，什么都没有写入。{body}")


def load_rows(path: str | Path) -> pd.DataFrame:
    """Read a dataset: a JSON array of objects with instruction, input and output.

    Returns one row a dialogue, text columns ``instruction``, ``input``, ``output``; a missing
    ``input`` is the empty text, other fields are left out. The index is the row number in the
    file, from 1. Raises DatasetError with every problem found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise DatasetError(path, [(0, "", "文件是空的，请先写入对话。")])
        rows = json.loads(text)
    except OSError as error:
        raise DatasetError(
            path, [(0, "", f"文件打不开（{error.strerror}），请检查路径。")]
        ) from None
    except UnicodeDecodeError:
        raise DatasetError(
            path, [(0, "", "文件不是 UTF-8 编码，请用编辑器另存为 UTF-8。")]
        ) from None
    except json.JSONDecodeError as error:
        where = f"文件第 {error.lineno} 行第 {error.colno} 个字符附近不合 JSON 的写法"
        raise DatasetError(path, [(0, "", f"{where}，请检查逗号、引号和括号。")]) from None

    if not isinstance(rows, list):
        raise DatasetError(path, [(0, "", "最外层应当是一个数组：用 [ ] 把所有对话括起来。")])
    if not rows:
        raise DatasetError(path, [(0, "", "数组里一条对话也没有，请至少写一条。")])
    problems = [
        (number, *problem) for number, row in enumerate(rows, 1) for problem in _row_problems(row)
    ]
    if problems:
        raise DatasetError(path, problems)
    table = [{field: row.get(field, "") for field in FIELDS} for row in rows]
    return pd.DataFrame(table, index=range(1, len(rows) + 1), columns=list(FIELDS), dtype=object)


def _row_problems(row) -> list[tuple[str, str]]:
    """What is wrong with one row, as (field, message)."""
    if not isinstance(row, dict):
        return [("", '这一条应当是 {"instruction": …, "input": …, "output": …}。')]
    problems = []
    for field in FIELDS:
        if field not in row:
            if field != "input":
                problems.append((field, "缺少这个字段，请补上。"))
        elif not isinstance(row[field], str):
            problems.append(
                (
                    field,
                    f"应当是一段文字，这里却是 {json.dumps(row[field], ensure_ascii=False)[:40]}，请加上引号。",
                )
            )
    if not problems:
        if not (row["instruction"] + row.get("input", "")).strip():
            problems.append(("instruction", "是空的，请写上对她说的话。"))
        if not row["output"].strip():
            problems.append(("output", "是空的，请写上她的回答。"))
    return problems


def normalised(instruction: str) -> str:
    """`instruction` as it is compared: without punctuation, spaces, and differences of width and case."""
    folded = unicodedata.normalize("NFKC", instruction).casefold()
    return re.sub(r"[\W_]+", "", folded) or instruction.strip()


def asks_identity(rows: pd.DataFrame) -> pd.Series:
    """Which rows (bools) ask who she is: a short question whose answer gives her name."""
    named = rows["output"].map(lambda answer: all(character in answer for character in NAME))
    return named & (rows["instruction"].str.len() <= 15) & (rows["input"] == "")


def split_by_instruction(
    rows: pd.DataFrame, eval_fraction: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into (train, eval) so that no instruction stands on both sides.

    Rows whose instructions are the same once :func:`normalised` stay together. Identity questions
    (:func:`asks_identity`) and the rest are drawn apart, `eval_fraction` of the unique instructions
    of each; of a handful of identity questions that is none, so that she can learn her name. Where
    it comes to nothing at all, one instruction goes to eval, if there are two. Order and index of
    the rows are kept. The same seed gives the same split.
    """
    key = rows["instruction"].map(normalised)
    unique, identity = set(key), set(key[asks_identity(rows)])
    rng = random.Random(seed)
    held_out: set[str] = set()
    for group in (identity, unique - identity):
        held_out.update(rng.sample(sorted(group), round(len(group) * eval_fraction)))
    if not held_out and len(unique) > 1:
        held_out = {rng.choice(sorted(unique - identity) or sorted(unique))}
    in_eval = key.isin(held_out)
    return rows[~in_eval], rows[in_eval]
