import json
import os
import random
import sys
import threading
import time

import pandas as pd
import pytest
from benchmarks.read_rows import measure, write

from huanhuan.reader import DatasetError, fill_placeholders, load_rows

GOOD = {"instruction": "你好", "input": "", "output": "你好。"}
OTHER = {"instruction": "你是谁", "input": "", "output": "我是甄嬛。"}
A = json.dumps(GOOD, ensure_ascii=False)
B = json.dumps(OTHER, ensure_ascii=False)
NOISE = random.Random(1).randbytes(500)
HEAD = "instruction,input,output\n"


def saved(tmp_path, content, name="mine.json"):
    """A file of these bytes, this text as UTF-8, or these rows as JSON."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content, ensure_ascii=False)
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path):
    with pytest.raises(DatasetError) as caught:
        load_rows(path)
    return caught.value


def said(path) -> str:
    """The report, but for the sentence that every small file gets."""
    return "\n".join(one for one in load_rows(path).attrs["report"] if not one.startswith("只有 "))


def texts(table) -> list[dict]:
    return table[["instruction", "input", "output"]].to_dict("records")


def turns(*spoken):
    """A row of messages: u is user, a assistant, s system, other roles are left as they are."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    roles = [names.get(role, role) if isinstance(role, str) else role for role, _ in spoken]
    texts = [text for _, text in spoken]
    return {
        "messages": [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
        ]
    }


# Content, file name, row, field, what the remedy says. GOOD and OTHER stand for what is right.
ZOO = {
    # files that are no data
    "empty": ("", "a.json", 0, "", "空的，请先写入对话"),
    "white space": (" \n\t ", "a.json", 0, "", "空的，请先写入对话"),
    "BOM alone": (b"\xef\xbb\xbf", "a.json", 0, "", "空的，请先写入对话"),
    "UTF-16 BOM alone": (b"\xff\xfe", "a.csv", 0, "", "空的，请先写入对话"),
    "no rows": ([], "a.json", 0, "", "请至少写两条"),
    "header alone": (HEAD, "a.csv", 0, "", "请至少写两条"),
    "one row": ([GOOD], "a.json", 0, "", "只有一个不同的问题"),
    "one question": ([GOOD, GOOD | {"instruction": "你好 "}], "a.json", 0, "", "验证集"),
    "excel": (b"PK\x03\x04\x14\0\x06\0" + NOISE, "a.csv", 0, "", "另存为“CSV UTF-8"),
    "old excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + NOISE, "a.xls", 0, "", "另存为“CSV UTF-8"),
    "pdf": (b"%PDF-1.7\n" + NOISE, "a.json", 0, "", "不是文字"),
    "rtf": (b"{\\rtf1\\ansi", "a.json", 0, "", "整理成 JSON"),
    "png": (b"\x89PNG\r\n\x1a\n" + NOISE, "a.json", 0, "", "不是文字"),
    "gzip": (b"\x1f\x8b\x08\0" + NOISE, "a.json", 0, "", "请先解压"),
    "parquet": (b"PAR1\x15\0" + NOISE, "a.json", 0, "", "不是文字"),
    "binary": (bytes(range(256)) * 9, "a.json", 0, "", "不是文字"),
    "all NUL": (bytes(300), "a.json", 0, "", "不是文字"),
    "web page": ("<!DOCTYPE html><html></html>", "a.json", 0, "", "重新下载原始文件"),
    "LFS pointer": ("version https://git-lfs.github.com/spec/v1", "a.json", 0, "", "重新下载原始文件"),
    "plain text": ("你好", "a.json", 0, "", "这是一篇文字，不是一问一答的数据"),
    # encodings
    "a broken byte": (f"[{A},\n{B}]".encode()[:-3] + b"\xff\xff]", "a.json", 0, "", "不是文字"),
    "cut within a character": (f"[{A},{B}]".encode()[:22], "a.json", 1, "", "请重新下载"),
    "Latin-1": ('[{"instruction": "déjà vu", "output": "ça va"}]'.encode("latin-1"), "a.json", 0, "", "另存为 UTF-8"),
    "half a UTF-16": (f"[{A},{B}]".encode("utf-16")[:-1], "a.json", 0, "", "不是文字"),
    # the outermost value
    "empty object": ({}, "a.json", 0, "", "里面一条对话也没有"),
    "text": ('"你好"', "a.json", 0, "", "整理成 JSON"),
    "number": ("7", "a.json", 0, "", "整理成 JSON"),
    "null": ("null", "a.json", 0, "", "整理成 JSON"),
    "objects on several lines": (json.dumps(GOOD, indent=1) + "\n" + A, "a.json", 0, "", "只有一个不同的问题"),
    # JSON syntax
    "trailing comma in a row": (f'[{A},{{"instruction": "a", "output": "b",}}]', "a.json", 2, "", "多了一个逗号"),
    "two commas": (f"[{A},,{B}]", "a.json", 2, "", "多了一个逗号"),
    "no comma between fields": ('[{"instruction": "a" "output": "b"}]', "a.json", 1, "", "少了一个英文逗号"),
    "no colon": ('[{"instruction" "a"}]', "a.json", 1, "", "字段名带英文双引号"),
    "single quotes": (f"[{A},\n{{'instruction': 'a'}}]", "a.json", 2, "", "单引号"),
    "full-width quotes": (f"[{A},{{“instruction”: “a”}}]", "a.json", 2, "", "全角的"),
    "full-width end quote": ('[{"instruction": "a”, "output": "b"}]', "a.json", 1, "", "结尾的引号不能是全角"),
    "full-width colon": ('[{"instruction"："a"}]', "a.json", 1, "", "标点应当是英文的"),
    "full-width comma": (f"[{A}，{B}]", "a.json", 1, "", "标点应当是英文的"),
    "full-width bracket": (f"【{A}】", "a.json", 1, "", "标点应当是英文的"),
    "comment": (f"[{A}, // 第二条\n{B}]", "a.json", 2, "", "不能写注释"),
    "comment first": (f"# 对话\n[{A}]", "a.json", 1, "", "不能写注释"),
    "line break in a text": ('[{"instruction": "a\nb", "output": "c"}]', "a.json", 1, "", "写成 \\n"),
    "tab in a text": ('[{"instruction": "a\tb", "output": "c"}]', "a.json", 1, "", "写成 \\n、\\t"),
    "control in a text": ('[{"instruction": "a\x07b", "output": "c"}]', "a.json", 1, "", "控制字符"),
    "quote in a text": ('[{"instruction": "他说"好"吧", "output": "c"}]', "a.json", 1, "", '写成 \\"'),
    "backslash": ('[{"instruction": "C:\\data", "output": "c"}]', "a.json", 1, "", "写成 \\\\"),
    "None": ('[{"instruction": "a", "output": None}]', "a.json", 1, "", "（如 Python）的写法"),
    "True": ('[{"instruction": "a", "output": True}]', "a.json", 1, "", "（如 Python）的写法"),
    "nan": ('[{"instruction": "a", "output": nan}]', "a.json", 1, "", "JSON 里没有"),
    "ellipsis": (f"[{A}, ...]", "a.json", 2, "", "省略号"),
    "key without quotes": ('[{instruction: "a"}]', "a.json", 1, "", "字段名带英文双引号"),
    "brackets crossed": ('[{"instruction": "a"]', "a.json", 1, "", "结尾的引号不能是全角"),
    "cut in a text": (f"[{A},{B}"[:-5], "a.json", 2, "", "没有结束的引号"),
    "cut in a row": (f"[{A},{B}"[:-1], "a.json", 2, "", "文件不完整"),
    "cut between rows": (f"[{A}", "a.json", 1, "", "文件不完整"),
    "cut after the bracket": ("[", "a.json", 1, "", "文件不完整"),
    "text after the end": (f"[{A},{B}]\n完", "a.json", 2, "", "删掉后面多出来的"),
    "nested too deeply": ("[" * 100_000, "a.json", 1, "", "括号套得太深"),
    # JSON lines
    "bad line": (f"{A}\n\n你好\n{B}\n", "a.jsonl", 2, "", "文件第 3 行第 1 个字符"),
    "first line cut off": (f"{A[:-1]}\n{B}\n", "a.jsonl", 1, "", "结尾的引号不能是全角"),
    "line cut off": (f"{A}\n{B[:-1]}", "a.jsonl", 2, "", "文件第 2 行"),
    # rows
    "row a text": ([GOOD, "你好"], "a.json", 2, "", '这一条应当是 {"instruction"'),
    "row null": ([GOOD, None], "a.json", 2, "", "这一条应当是"),
    "output null": ([GOOD, OTHER | {"output": None}], "a.json", 2, "output", "应当是一段文字"),
    "input null": ([GOOD, OTHER | {"input": None}], "a.json", 2, "input", 'input 没有内容就写 ""'),
    "integer": ([GOOD, OTHER | {"instruction": 7}], "a.json", 2, "instruction", "应当是一段文字"),
    "float": ('[{"instruction": "a", "output": 1.50}]', "a.json", 1, "output", "应当是一段文字"),
    "endless integer": (f'[{{"instruction": "a", "output": {"9" * 5000}}}]', "a.json", 1, "output", "应当是一段文字"),
    "NaN": ('[{"instruction": "a", "output": NaN}]', "a.json", 1, "output", "应当是一段文字"),
    "true": ([OTHER | {"output": True}], "a.json", 1, "output", "应当是一段文字"),
    "list": ([GOOD, OTHER | {"input": ["a"]}], "a.json", 2, "input", "应当是一段文字"),
    "object": ([GOOD, OTHER | {"output": {"a": "b"}}], "a.json", 2, "output", "角色 a 不认识"),
    "no output": ([GOOD, {"instruction": "a"}], "a.json", 2, "output", "缺少 output"),
    "misspelt": ([{"instuction": "a", "output": "b"}], "a.json", 1, "instruction", "缺少 instruction"),
    "nothing asked": ([GOOD, OTHER | {"instruction": " "}], "a.json", 2, "instruction", "是空的"),
    "nothing answered": ([GOOD, OTHER | {"output": " \n"}], "a.json", 2, "output", "她的回答"),
    "NUL in a text": ([GOOD, OTHER | {"output": "a\0"}], "a.json", 2, "output", "乱码、控制字符"),
    "C1 control": ([GOOD, OTHER | {"output": "a\x85"}], "a.json", 2, "output", "乱码、控制字符"),
    "lone surrogate": ('[{"instruction": "a", "output": "好\\ud83d"}]', "a.json", 1, "output", "乱码、控制字符"),
    "garbled": ([GOOD, OTHER | {"input": "�"}], "a.json", 2, "input", "乱码、控制字符"),
    # dialogues in turns
    "two users": ([turns(("u", "a"), ("u", "b"), ("a", "c"))], "a.json", 0, "", "只有一个不同的问题"),
    "assistant first": ([turns(("a", "a"), ("u", "b"))], "a.json", 0, "", "里面一条对话也没有"),
    "user last": ([turns(("u", "a"), ("a", "b"), ("u", "c"))], "a.json", 0, "", "只有一个不同的问题"),
    "no turns": ([{"messages": []}], "a.json", 0, "", "里面一条对话也没有"),
    "system alone": ([turns(("s", "a"))], "a.json", 0, "", "里面一条对话也没有"),
    "unknown role": ([turns(("tool", "a"))], "a.json", 1, "messages", "不认识"),
    "role a list": ([turns((["user"], "a"))], "a.json", 1, "messages", "不认识"),
    "content null": ([turns(("u", "a"), ("a", None))], "a.json", 1, "messages", "应当是一段文字"),
    "content a list": ([turns(("u", [{"type": "text"}]), ("a", "b"))], "a.json", 1, "messages", "应当是一段文字"),
    "content blank": ([turns(("u", "a"), ("a", " "))], "a.json", 1, "messages", "是空的"),
    "content garbled": ([turns(("u", "a�"), ("a", "b"))], "a.json", 1, "messages", "乱码、控制字符"),
    "turn a text": ('[{"conversations": [7]}]', "a.json", 1, "conversations", "应当是一段文字"),
    "turns a text": ([{"messages": "你好"}], "a.json", 1, "messages", "应当是一个数组"),
    "turn with a repeated key": ('[{"messages": [{"role": "user", "role": "user", "content": "a"}]}]', "a.json", 1, "role", "写了不止一次"),
    "repeated key": (f'[{A}, {{"instruction": "a", "instruction": "b", "output": "c"}}]', "a.json", 2, "instruction", "写了不止一次"),
    # CSV
    "no header": ("你好,,你好。\n你是谁,,我是甄嬛。\n", "a.csv", 0, "", "第一行就是对话的"),
    "full-width header": ("instruction，input，output\na,,b\n", "a.csv", 0, "", "改名为 instruction"),
    "misspelt header": ("instuction,input,output\na,,b\n", "a.csv", 0, "", "改名为 instruction"),
    "repeated column": ("instruction,output,output\na,b,c\n", "a.csv", 0, "", "同名的列"),
    "too many cells": (HEAD + "a,,b\nc,,d,e\n", "a.csv", 2, "", "文件第 3 行有 4 格"),
    "too few cells": (HEAD + "a,,b\nc,d\n", "a.csv", 2, "", "格，列名有"),
    "unclosed quote": (HEAD + 'a,,b\nc,,"d\ne,,f\n', "a.csv", 2, "", "引号没有配对"),
    "quote within quotes": (HEAD + 'a,,b\nc,,"他说"好"吧"\n', "a.csv", 2, "", '写成两个 ""'),
    "space before a quote": (HEAD + 'a,,b\nc,, "d"\n', "a.csv", 2, "", "格，列名有"),
    "NUL in a cell": (HEAD + "你好,,好\n你是谁,,甄\0嬛\n", "a.csv", 2, "output" if sys.version_info >= (3, 11) else "", "U+0000"),
    "empty cell": (HEAD + "a,,b\nc,,\n", "a.csv", 2, "output", "她的回答"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_bad_file_is_refused_with_row_field_and_remedy(tmp_path, name):
    content, file_name, row, field, remedy = ZOO[name]
    error = refused(saved(tmp_path, content, file_name))
    assert remedy in str(error) and file_name in str(error)
    assert not row or f"第 {row} 条" in str(error)
    assert field in str(error)
    assert [problem[:2] for problem in error.problems] == [(row, field)]
    assert remedy in error.problems[0][2]
    str(error).encode()  # can be printed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"[{A},\n  {B[:-1]};}}]", f"文件第 2 行第 {len(B) + 2} 个字符"),
        (f"[\n{A}\n\n  ：{B}]", "文件第 4 行第 3 个字符"),
        (f'[\n{A},\n{{"output": None}}]', "文件第 3 行第 12 个字符"),
    ],
)
def test_place_of_a_syntax_error(tmp_path, content, says):
    assert says in str(refused(saved(tmp_path, content)))


@pytest.mark.parametrize("depth", [500, 900, 3000, 100_000])
@pytest.mark.parametrize(
    "row", ['{"messages": [%s]}', "[%s]", '{"role": "user", "content": "a", "time": [%s]}']
)
def test_nesting_of_any_depth_ends_in_a_dataset_error(tmp_path, row, depth):
    before, after = row.split("%s")
    refused(saved(tmp_path, f"[{A}, {before * depth}{after * depth}, 7]"))
    refused(saved(tmp_path, f"[{row % ('[' * depth + ']' * depth)}, 7]"))


def test_every_problem_is_listed_twenty_are_shown(tmp_path):
    error = refused(saved(tmp_path, [{"instruction": "a"}] * 25))
    assert [problem[0] for problem in error.problems] == list(range(1, 26))
    assert "第 20 条" in str(error) and "第 21 条" not in str(error) and "还有 5 处" in str(error)


def test_problems_of_all_kinds_come_together(tmp_path):
    rows = [
        {"instruction": 7, "output": "a"},
        {"input": ""},
        GOOD,
        "你好",
        OTHER | {"output": "\x07"},
    ]
    error = refused(saved(tmp_path, rows))
    places = [(1, "instruction"), (2, "instruction"), (4, ""), (5, "output")]
    assert [problem[:2] for problem in error.problems] == places


def test_broken_syntax_is_named_first_and_what_came_before_is_not_lost(tmp_path):
    error = refused(saved(tmp_path, f'[{A}, {{"instruction": "a"}}, {B} x]'))
    assert [problem[:2] for problem in error.problems] == [(3, ""), (2, "output")]


def test_after_a_thousand_problems_reading_ends(tmp_path):
    error = refused(saved(tmp_path, "{}\n" * 5000, "a.jsonl"))
    assert len(error.problems) == 1000 and "不止 980 处" in str(error)


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    assert "打不开" in str(refused(tmp_path / "nowhere.json"))
    assert "文件夹" in str(refused(tmp_path))
    assert "打不开" in str(refused(tmp_path / "a\0b.json"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    assert "不是普通文件" in str(refused(tmp_path / "pipe.json"))


def test_no_permission(tmp_path, monkeypatch):
    def denied(path):  # not chmod: root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    assert "权限" in str(refused(saved(tmp_path, [GOOD, OTHER])))


def test_file_that_is_still_written_is_refused(tmp_path):
    path, done = saved(tmp_path, [GOOD, OTHER]), threading.Event()

    def append():
        with path.open("ab", buffering=0) as file:
            while not done.is_set():
                file.write(b" ")

    writer = threading.Thread(target=append)
    writer.start()
    try:
        said, deadline = "", time.monotonic() + 20
        while "读的时候变了" not in said and time.monotonic() < deadline:
            try:
                load_rows(path)
            except DatasetError as error:
                said = str(error)
    finally:
        done.set()
        writer.join()
    assert "读的时候变了" in said and "再运行一次" in said
    assert len(load_rows(path)) == 2  # and once it is quiet


def test_file_that_is_replaced_by_one_of_the_same_size_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, [GOOD, OTHER])

    def read_and_touch(self):
        with self.open("rb") as file:
            raw = file.read()
        os.utime(self, ns=(1, self.stat().st_mtime_ns + 1))
        return raw

    monkeypatch.setattr("pathlib.Path.read_bytes", read_and_touch)
    assert "读的时候变了" in str(refused(path))


def test_texts_come_back_as_written(tmp_path):
    rows = [
        {"instruction": "007", "output": " 有空格 \n\t换行\r\n😀"},
        GOOD | {"input": "材料", "output": '他说："好"\\n'},
        {"instruction": "", "input": "只有材料", "output": "null"},
    ]
    wanted = [{"input": ""} | row for row in rows]
    table = load_rows(saved(tmp_path, rows))
    assert list(table.columns) == ["instruction", "input", "output", "history"]
    assert texts(table) == wanted
    assert list(table.index) == [1, 2, 3] and list(table["history"]) == [[], [], []]
    both = "instruction 和 input 都有内容，在提示里用一个换行接起来：第 2 条。"
    assert table.attrs["report"][:-1] == [both] and table.attrs["placeholders"] == {}
    lines = "\n".join(json.dumps(row) for row in rows)
    assert texts(load_rows(saved(tmp_path, lines, "a.jsonl"))) == wanted
    pd.DataFrame(wanted).to_csv(tmp_path / "a.csv", index=False, lineterminator="\r\n")
    table = load_rows(tmp_path / "a.csv")
    assert texts(table) == wanted and table.attrs["report"][:-1] == [both]


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-16", ""),
        ("utf-16-le", "UTF_16_LE"),
        ("utf-16-be", "UTF_16_BE"),
        ("gbk", "GB18030"),
        ("gb18030", "GB18030"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_encodings(tmp_path, encoding, says, name):
    content = f"[{A},{B}]" if name == "a.json" else HEAD + "你好,,你好。\n你是谁,,我是甄嬛。\n"
    path = saved(tmp_path, content.encode(encoding), name)
    assert texts(load_rows(path)) == [GOOD, OTHER]
    assert says in said(path) and bool(said(path)) == bool(says)


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("encoding", ["gbk", "big5"])
def test_a_long_file_that_begins_with_a_chinese_character(tmp_path, encoding, shift):
    rows = "".join(f"好,{'a' * shift}性本善{number}\n" for number in range(3000))
    head = "回答,q\n" if encoding == "gbk" else "a,q\n"  # a sample may end within a character
    path = saved(tmp_path, (head + rows).encode(encoding), "a.csv")
    assert len(load_rows(path)) == 3000 and "编码，已按这种编码读入" in said(path)


def test_traditional_characters_in_gbk(tmp_path):
    rows = [
        {"instruction": "妳從哪裡來", "output": "臣妾從宮裡來，這裡風大。"},
        GOOD | {"input": "雪"},
    ]
    path = saved(tmp_path, json.dumps(rows, ensure_ascii=False).encode("gbk"))
    assert load_rows(path)["output"][1] == rows[0]["output"]


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (f"{A}\n{B}\n", "a.json", ""),
        (f"[{A}\n{B}]", "a.json", ""),
        (f"{A},\n{B},\n", "a.jsonl", ""),
        (f"\ufeff\ufeff[{A},{B}]", "a.json", ""),
        (f"[{A},{B}]", "a.jsonl", ""),
        (f"[{A},{B}]", "a.txt", ""),
        (f"[{A},{B}]", "a.csv", ""),
        (HEAD + "你好,,你好。\n你是谁,,我是甄嬛。", "a.json", ""),
        (f"{A}\n\n{B}\n\n", "a.jsonl", ""),
        (HEAD + "\n你好,,你好。\n,,\n你是谁,,我是甄嬛。\n", "a.csv", ""),
        (HEAD.replace(",", ";") + "你好;;你好。\n你是谁;;我是甄嬛。", "a.csv", ""),
        (HEAD.replace(",", "\t") + "你好\t\t你好。\r\n你是谁\t\t我是甄嬛。", "a.csv", ""),
        (HEAD.strip() + "\r你好,,你好。\r你是谁,,我是甄嬛。\r", "a.csv", ""),
        ('"instruction","input","output"\n"你好","","你好。"\n你是谁,,我是甄嬛。', "a.csv", ""),
        ([GOOD | {"source": "书"}, OTHER], "a.json", "字段 source 课程用不到，没有读入：第 1 条"),
        ([{"prompt": "你好", "response": "你好。"}, OTHER], "a.json", "prompt、response 换成了"),
        ([{"prompt": "你好", "completion": "你好。"}, OTHER], "a.json", "completion 换成了"),
        ("question,answer\n你好,你好。\n你是谁,我是甄嬛。\n", "a.csv", "question、answer 换成了"),
        ([turns(("u", "你好"), ("a", "你好。")), OTHER], "a.json", ""),
        (
            [turns(("s", "你是甄嬛"), ("u", "你好"), ("a", "你好。")), OTHER],
            "a.json",
            "system 的话没有读入，课程有自己的系统提示：第 1 条",
        ),
        (
            [{"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好。"}]}]
            + [OTHER],
            "a.json",
            "",
        ),
    ],
)  # fmt: skip
def test_other_ways_of_writing_the_same_are_read_and_reported(tmp_path, content, name, says):
    path = saved(tmp_path, content, name)
    table = load_rows(path)
    assert texts(table) == [GOOD, OTHER]
    assert says in said(path) and bool(said(path)) == bool(says)
    assert all(sentence.endswith("。") for sentence in table.attrs["report"])


def test_dialogue_of_several_turns_becomes_several_rows(tmp_path):
    spoken = turns(("u", "一"), ("a", "二"), ("s", "别的"), ("u", "三"), ("a", "四"))
    spoken["messages"][1]["mood"] = "喜"
    table = load_rows(saved(tmp_path, [GOOD, spoken, OTHER]))
    assert list(table.index) == [1, 2, 2, 3]
    assert table.loc[2].to_dict("records") == [
        {"instruction": "一", "input": "", "output": "二", "history": []},
        {"instruction": "三", "input": "", "output": "四", "history": [["一", "二"]]},
    ]
    report = "\n".join(table.attrs["report"])
    assert "的话（history）：第 2 条" in report
    assert "字段 mood 课程用不到" in report


def test_duplicates_are_kept_and_reported(tmp_path):
    rows = [GOOD, OTHER] * 20
    table = load_rows(saved(tmp_path, rows))
    assert len(table) == 40
    (alike,) = table.attrs["report"]
    assert "完全相同" in alike and "第 3、4、5、6、7、8、9、10、11、12 等 38 条" in alike


def test_long_cell_of_a_csv_is_read(tmp_path):
    path = saved(tmp_path, HEAD + "你好,,你好。\n你是谁,," + "长" * 200_000)
    assert load_rows(path)["output"].str.len().tolist() == [3, 200_000]


def test_field_names_that_never_end_do_not_fill_the_report(tmp_path):
    rows = [GOOD | {f"字段{number}": ""} for number in range(1500)] + [OTHER]
    report = load_rows(saved(tmp_path, rows)).attrs["report"]
    assert len(report) == 101 and "字段 字段99 课程用不到，没有读入：第 100 条。" in report
    assert any("没有一一列出" in sentence and "等 2899 条" in sentence for sentence in report)


def d(ask, answer, given="", history=(), **more):
    """A row as it comes back; `more` stands beside it in the file."""
    return {
        "instruction": ask,
        "input": given,
        "output": answer,
        "history": [*map(list, history)],
    } | more


U, A1 = {"role": "user", "content": "有座吗？"}, {"role": "assistant", "content": "里边请。"}
U2, A2 = {"role": "user", "content": "来壶茶"}, {"role": "assistant", "content": "这就来。"}
ONE, TWO, PAY = d("有座吗？", "里边请。"), d("来壶茶", "这就来。"), d("结账", "三文钱。")
TWO_AFTER = d("来壶茶", "这就来。", history=[["有座吗？", "里边请。"]])
ROW, ROW2 = ({k: r[k] for k in ("instruction", "input", "output")} for r in (ONE, TWO))


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def fields(ask, answer, **more):
    """The two rows under other names."""
    return [
        {**more, ask: "有座吗？", answer: "里边请。"},
        {**more, ask: "来壶茶", answer: "这就来。"},
    ]


def chat(*messages, names=("is_sender", "msg")):
    head = ",".join(["id", "type_name", names[0], "talker", "room_name", names[1], "CreateTime"])
    return "\n".join([head, *(f"{i},{line}" for i, line in enumerate(messages, 1))])


PAIR, BOTH = [ONE, TWO], [ONE, TWO_AFTER]
# What it is: content, file name, the rows that come back, words of the report (or two, after " + ").
SHAPES = {
    # placeholders
    "braces": ([ROW, d("你是谁", "我是 {{name}}，{{ author }} 写的")], "a.json", [ONE, d("你是谁", "我是 {{name}}，{{ author }} 写的")], "占位符 {{name}} 还没有换成真的内容，照这样训练，她会原样说出来：第 2 条"),
    "angle": ([d("你好，<NAME>", "好"), ROW], "a.json", [d("你好，<NAME>", "好"), ONE], "占位符 <NAME> 还没有"),
    "single brace": ([d("你是谁", "我是{name}"), ROW], "a.json", [d("你是谁", "我是{name}"), ONE], "占位符 {name} 还没有"),
    "square": ([d("你是谁", "我是[NAME]"), ROW], "a.json", [d("你是谁", "我是[NAME]"), ONE], "占位符 [NAME] 还没有"),
    "Chinese": ([d("你是谁", "我是【你的名字】"), ROW], "a.json", [d("你是谁", "我是【你的名字】"), ONE], "占位符 【你的名字】 还没有"),
    "bot_name": ([d("你是谁", "我是<bot_name>"), ROW], "a.json", [d("你是谁", "我是<bot_name>"), ONE], "占位符 <bot_name> 还没有"),
    "no placeholder": ([d("写 f{x} 与 [1]", "<b>a</b> <name>b</name> [user](a)"), ROW], "a.json", [d("写 f{x} 与 [1]", "<b>a</b> <name>b</name> [user](a)"), ONE], ""),
    # bad answers
    "label false": ([ROW | {"label": True}, d("滚", "滚") | {"label": False}, ROW2 | {"label": True}], "a.json", PAIR, "标着 label: false 的是不好的回答，没有读入：第 2 条"),
    "label 0 in a table": ("prompt,completion,label\n有座吗？,里边请。,1\n坏,坏,0\n来壶茶,这就来。,1", "a.csv", PAIR, "标着 label: 0 的是"),
    "label of a dialogue": (lines({"messages": [U, A1]}, {"messages": [U2, A2]}, {"messages": [U, A2], "label": False}), "a.jsonl", PAIR, "第 3 条"),
    "weight of a row": ([ROW, ROW2, ROW2 | {"output": "走", "weight": 0}], "a.json", PAIR, "weight: 0"),
    "rating 0 is not certain": ([ROW, ROW2 | {"rating": 0}], "a.json", PAIR, "字段 rating 课程用不到"),
    "weight of a turn": ([{"messages": [U, A1 | {"weight": 0}, U2, A2]}, ROW], "a.json", [TWO_AFTER, ONE], "标着 weight: 0 的是不好的回答，没有读入"),
    "chosen": (fields("prompt", "chosen", rejected="滚"), "a.json", PAIR, "rejected 是不好的回答，没有读入：第 1、2 条"),
    "chosen turns": ([{"prompt": "有座吗？", "chosen": [U, A1], "rejected": [U, A2]}, {"prompt": [U, A1, U2], "chosen": [A2], "rejected": [A1]}], "a.json", [ONE, ONE, TWO_AFTER], "rejected 是不好的回答"),
    "chosen alone": ([{"chosen": [U, A1], "rejected": [U, A2]}, {"chosen": [U2, A2], "rejected": []}], "a.json", PAIR, "rejected 是不好的回答，没有读入"),
    "chosen of conversations": ([{"conversations": [{"from": "human", "value": "有座吗？"}], "chosen": {"from": "gpt", "value": "里边请。"}, "rejected": {"from": "gpt", "value": "滚"}}, ROW2], "a.json", PAIR, "rejected 是"),
    "marks of good and bad": ([ROW | {"label": "good", "weight": 1.0}, ROW2 | {"chosen": True}, PAY | {"label": "undesirable"}, PAY | {"weight": 0.0}, PAY | {"chosen": False}, PAY | {"status": "rejected"}, PAY | {"loss": False}], "a.json", PAIR, "标着 label: undesirable 的是 + 标着 weight: 0.0 的是"),
    "marks that say something else": ([ROW | {"label": "情感", "weight": 0.5}, ROW2], "a.json", PAIR, "字段 label 课程用不到 + 字段 weight 课程用不到"),
    "chosen_response": (fields("prompt", "chosen_response", rejected_response="滚"), "a.json", PAIR, "rejected 是不好的回答，没有读入：第 1、2 条"),
    "rejected alone": ([ROW, {"prompt": "坏", "rejected": "坏"}, ROW2], "a.json", PAIR, "标着 rejected: 坏 的是不好的回答，没有读入"),
    # dialogues
    "human and assistant": (lines({"system": "掌柜", "conversation": [{"human": "有座吗？", "assistant": "里边请。"}, {"human": "来壶茶", "assistant": "这就来。"}]}), "a.jsonl", BOTH, "system 的话没有读入"),
    "input and output turns": ([{"conversation": [{"system": "掌柜", "input": "有座吗？", "output": "里边请。"}, {"input": "来壶茶", "output": "这就来。"}]}], "a.json", BOTH, "system 的话没有读入，课程有自己的系统提示"),
    "system, input, output rows": ([{"system": "", "input": "有座吗？", "output": "里边请。"}, {"system": "", "input": "来壶茶", "output": "这就来。"}], "a.json", PAIR, "字段 input 换成了 instruction"),
    "a list a line": (lines([U, A1], [U2, A2]), "a.jsonl", PAIR, ""),
    "a list of lists": ([[U, A1, U2, A2], [U2, A2]], "a.json", [*BOTH, TWO], "多轮对话每个回答成了一条，带着之前（最多 100 轮）的话（history）"),
    "pairs": ([["有座吗？", "里边请。"], ["来壶茶", "这就来。"]], "a.json", PAIR, ""),
    "lists of pairs": ([[["有座吗？", "里边请。"], ["来壶茶", "这就来。"]], [["结账", "三文钱。"]]], "a.json", [*BOTH, PAY], "多轮对话每个回答成了一条，带着之前（最多 100 轮）的话（history）"),
    "role and text in a list": ([[["user", "有座吗？"], ["assistant", "里边请。"]], [["user", "来壶茶"], ["assistant", "这就来。"]]], "a.json", PAIR, ""),
    "texts in turn": ([{"id": 1, "data": ["有座吗？", "里边请。", "来壶茶", "这就来。"]}], "a.json", BOTH, "字段 id 课程用不到"),
    "lists of both": ([{"input": ["有座吗？", "来壶茶"], "output": ["里边请。", "这就来。"]}, ROW], "a.json", [*BOTH, ONE], "字段 input 换成了 instruction"),
    "speaker and utterance": ([{"dialogue": [{"speaker": "user", "utterance": "有座吗？"}, {"speaker": "bot", "utterance": "里边请。"}]}, ROW2], "a.json", PAIR, ""),
    "role and text": ([{"turns": [{"role": "Human", "text": "有座吗？"}, {"role": "AI", "text": "里边请。"}]}, ROW2], "a.json", PAIR, ""),
    "parts of a content": ([{"messages": [{"role": "user", "content": [{"type": "text", "text": "有座"}, {"type": "text", "text": "吗？"}]}, A1]}, ROW2], "a.json", PAIR, ""),
    "people of a play": ([{"messages": [{"role": "皇上", "content": "来"}, {"role": "苏培盛", "content": "快"}, {"role": "甄嬛", "content": "是。"}, {"role": "皇上", "content": "坐"}, {"role": "嬛儿", "content": "谢"}]}], "a.json", [d("来\n快", "是。"), d("坐", "谢", history=[["来\n快", "是。"]])], "多轮对话每个回答成了一条，带着之前（最多 100 轮）的话（history）"),
    "one dialogue alone": ({"messages": [U, A1, U2, A2]}, "a.json", BOTH, "多轮对话每个回答成了一条，带着之前（最多 100 轮）的话（history）"),
    "a file that is one dialogue": ([U, A1, U2, A2], "a.json", BOTH, "每条是一句话"),
    # history
    "history": ([ROW2 | {"history": [["有座吗？", "里边请。"]]}, PAY | {"history": []}], "a.json", [ONE, TWO_AFTER, PAY], "带着前文（history），每个回答各成一条：第 1 条"),
    "history already there": ([ROW, ROW2 | {"history": [["有座吗？", "里边请。"]]}], "a.json", BOTH, "在文件里另有一条，没有重复读入：第 2 条"),
    "history comes before": ([ROW2 | {"history": [["有座吗？", "里边请。"]]}, ROW], "a.json", [TWO_AFTER, ONE], "没有重复读入：第 1 条"),
    "history in roles": ([{"query": "来壶茶", "response": "这就来。", "history": [U, A1]}], "a.json", BOTH, "带着前文（history）"),
    "empty history and system": ([ROW | {"history": [], "system": ""}, ROW2 | {"history": None, "system": None}], "a.json", PAIR, ""),
    "system": ([ROW | {"system": "你是掌柜"}, ROW2], "a.json", PAIR, "system 的话没有读入，课程有自己的系统提示：第 1 条"),
    "history of one side too many": ([ROW2 | {"history": ["有座吗？", "里边请。", "再说"]}, ROW | {"history": [["一"], ["二", "三"]]}, PAY | {"history": [U]}], "a.json", [TWO, ONE, PAY], "history 里的话不是一问一答，没有读入：第 1、2、3 条"),
    "history of nothing": ([ROW | {"history": [[]]}, ROW2 | {"history": [["", ""]]}], "a.json", PAIR, ""),
    "chat_history": ([ROW2 | {"chat_history": [["有座吗？", "里边请。"]]}, PAY], "a.json", [ONE, TWO_AFTER, PAY], "带着前文（history）"),
    # names of fields
    "query, response": (fields("query", "response"), "a.json", PAIR, "字段 query、response 换成了 instruction、output：第 1、2 条"),
    "kind, input, target": (fields("input", "target", kind="闲聊"), "a.json", PAIR, "input、target 换成了 + 字段 kind 课程用不到"),
    "content, summary": (fields("content", "summary"), "a.json", PAIR, "content、summary 换成了"),
    "q, a": (fields("q", "a"), "a.json", PAIR, "q、a 换成了"),
    "ask, answer": (fields("ask", "answer"), "a.json", PAIR, "ask、answer 换成了"),
    "instruction, response": (fields("instruction", "response", context=""), "a.json", PAIR, "字段 context、response 换成了 input、output"),
    "prompt, output": (fields("prompt", "output"), "a.json", PAIR, "字段 prompt 换成了 instruction"),
    "Chinese names": ("问题,回答\n有座吗？,里边请。\n来壶茶,这就来。", "a.csv", PAIR, "问题、回答 换成了"),
    "capitals": (fields("Question", "Answer"), "a.json", PAIR, "Question、Answer 换成了"),
    "one answer in a list": ([{"question": "有座吗？", "answers": ["里边请。"]}, ROW2], "a.json", PAIR, "question、answers 换成了"),
    "answers of SQuAD": ([{"question": "有座吗？", "answers": {"text": ["里边请。"], "answer_start": [3]}}, {"question": "来壶茶", "answers": [{"text": "这就来。"}]}], "a.json", PAIR, "question、answers 换成了"),
    "answer in an object": ([{"instruction": "有座吗？", "output": {"content": "里边请。"}}, ROW2], "a.json", PAIR, ""),
    "turns that name nobody": ([{"messages": [{"message": "有座吗？"}, {"message": "里边请。"}]}, ROW2], "a.json", PAIR, ""),
    "our own name and another case": ([ROW | {"Instruction": "x"}, ROW2], "a.json", PAIR, "字段 Instruction 课程用不到"),
    "instances": ([{"instruction": "换成同义词", "instances": [{"input": "欢喜", "output": "高兴"}, {"input": "哀", "output": "悲"}]}, ROW], "a.json", [d("换成同义词", "高兴", "欢喜"), d("换成同义词", "悲", "哀"), ONE], "用一个换行接起来：第 1 条"),
    # what holds the rows
    "viewer": ({"features": [{"name": "instruction"}], "rows": [{"row_idx": 0, "row": ROW, "truncated_cells": []}, {"row_idx": 1, "row": ROW2, "truncated_cells": []}]}, "a.json", PAIR, ""),
    "cut by the viewer": ({"rows": [{"row": ROW, "truncated_cells": []}, {"row": PAY, "truncated_cells": ["output"]}, {"row": ROW2, "truncated_cells": []}]}, "a.json", PAIR, "截短了这一条，没有读入：请下载完整的文件：第 2 条"),
    "data": ({"data": [ROW, ROW2]}, "a.json", PAIR, ""),
    "data and train": ({"data": {"train": [ROW, ROW2]}}, "a.json", PAIR, ""),
    "instances at the top": ({"type": "text2text", "instances": fields("input", "output")}, "a.json", PAIR, "字段 input 换成了"),
    "train and valid": ({"train": [["有座吗？", "里边请。"], ["来壶茶", "这就来。"]], "valid": [["结账", "三文钱。"]]}, "a.json", PAIR, "只读了 train 这一部分，valid 没有读入"),
    "dialogues at the top": ({"version": 1, "dialogues": [{"turns": [U, A1]}, {"turns": [U2, A2]}]}, "a.json", PAIR, ""),
    "more beside a row": ([ROW | {"data": {"from": "书"}, "pairs": [{"a": "b"}]}, ROW2], "a.json", PAIR, "字段 data 课程用不到 + 字段 pairs 课程用不到"),
    "orient index": ({"0": ROW, "1": ROW2}, "a.json", PAIR, ""),
    "orient columns": ({"instruction": {"0": "有座吗？", "1": "来壶茶"}, "output": {"0": "里边请。", "1": "这就来。"}}, "a.json", PAIR, ""),
    "lists of columns": ({"input": ["有座吗？", "来壶茶"], "output": ["里边请。", "这就来。"]}, "a.json", PAIR, "字段 input 换成了"),
    "orient split": ({"columns": ["instruction", "output"], "index": [0, 1], "data": [["有座吗？", "里边请。"], ["来壶茶", "这就来。"]]}, "a.json", PAIR, ""),
    "dialogues with names": ({"一": [U, A1], "二": [U2, A2]}, "a.json", PAIR, ""),
    # chats and scripts
    "WeChat": (chat("文本,0,友,友,吃了吗,2024/1/1 12:00", "文本,1,我,友,还没,2024/1/1 12:01", "文本,1,我,友,你呢,2024/1/1 12:01", "图片,0,友,友,x.png,2024/1/1 12:02", "文本,0,友,友,走,2024/1/1 12:03", "文本,1,我,友,好,2024/1/1 12:04"), "a.csv", [d("吃了吗", "还没\n你呢"), d("走", "好", history=[["吃了吗", "还没\n你呢"]])], "不是文字的消息没有读入：第 4 条"),
    "WeChat, another room": (chat("文本,0,友,甲,吃了吗,", "文本,1,我,甲,还没,", "文本,0,友,乙,走,", "文本,1,我,乙,好,"), "a.csv", [d("吃了吗", "还没"), d("走", "好")], "每条是一句话"),
    "WeChat in JSON": ([{"talker": "友", "isSelf": False, "type": 1, "content": "吃了吗"}, {"talker": "友", "isSelf": True, "type": 1, "content": "还没"}, {"talker": "别人", "isSelf": False, "type": 1, "content": "走"}, {"talker": "别人", "isSelf": True, "type": 1, "content": "好"}], "a.json", [d("吃了吗", "还没"), d("走", "好")], "每条是一句话"),
    "WeChat, rooms in turn": (chat("文本,0,甲,甲,吃了吗,", "文本,0,乙,乙,走,", "文本,1,我,甲,还没,", "文本,1,我,乙,好,"), "a.csv", [d("吃了吗", "还没"), d("走", "好")], "每条是一句话"),
    "WeChat, a night between": (chat("文本,0,友,友,吃了吗,2024/1/1 12:00", "文本,1,我,友,还没,2024/1/1 12:01", "文本,0,友,友,晚安,2024/1/1 23:00", "文本,1,我,友,早,2024/1/2 8:00", "文本,0,友,友,走,2024/1/2 8:01", "文本,1,我,友,好,2024/1/2 8:02"), "a.csv", [d("吃了吗", "还没"), d("走", "好")], "隔了 3 小时以上没有说话，之后算另一段对话：第 3、4 条"),
    "seconds and milliseconds": ([{"isMySend": k % 2, "message": t, "time": s} for k, (t, s) in enumerate([("吃了吗", 1704081600), ("还没", 1704081660), ("走", "1704160000000"), ("好", "1704160000001")])], "a.json", [d("吃了吗", "还没"), d("走", "好")], "隔了 3 小时以上"),
    "what is no word": (chat(",0,友,友,[图片],", ",0,友,友,吃了吗,", ",1,我,友,[表情][语音],", ",0,友,友,你撤回了一条消息,", ",0,友,友,<msg><img/></msg>,", ",1,我,友,还没[捂脸],", ",0,友,友,走,", ",1,我,友,好,"), "a.csv", [d("吃了吗", "还没[捂脸]"), d("走", "好", history=[["吃了吗", "还没[捂脸]"]])], "不是文字的消息没有读入：第 1、3、4、5 条"),
    "export with messages inside": ({"session": {"wxid": "a"}, "messages": [{"type": "文本消息", "content": t, "isSend": k % 2} for k, t in enumerate(["吃了吗", "还没", "走", "好"])]}, "a.json", [d("吃了吗", "还没"), d("走", "好", history=[["吃了吗", "还没"]])], "isSend 是 1 的是回答"),
    "a table of scenes": ("场次,角色,台词\n1,皇上,来\n1,甄嬛,是。\n2,皇上,坐\n2,甄嬛,谢\n1,甄嬛,谁\n", "a.csv", [d("来", "是。"), d("坐", "谢")], "她先开口，前面没有人说话，没有读入：第 5 条"),
    "talkers with remarks": ([{"talker": t, "content": c, "remark": c} for t, c in [("皇上", "来"), ("甄嬛", "是。"), ("皇上", "坐"), ("甄嬛", "谢")]], "a.json", [d("来", "是。"), d("坐", "谢", history=[["来", "是。"]])], "talker 是 甄嬛（或 assistant） 的是回答"),
    "system in a table of lines": ("role,content\nsystem,你是\nuser,来\nassistant,是。\nuser,坐\nassistant,谢\n", "a.csv", [d("来", "是。"), d("坐", "谢", history=[["来", "是。"]])], "system 的话没有读入"),
    "a table of lines": ("角色,台词\n皇上,来\n甄嬛,是。\n皇上,坐\n甄嬛,谢\n", "a.csv", [d("来", "是。"), d("坐", "谢", history=[["来", "是。"]])], "每条是一句话"),
    "script": ("第一场 殿 日\n皇上：来。\n（众人退下）\n甄嬛（行礼）：是。\n嬛儿：皇上万安。\n\n第二场 园\n眉庄：妹妹\n采月：小主\n甄嬛: 姐姐\n皇上：走\n", "a.txt", [d("来。", "是。\n皇上万安。"), d("妹妹\n小主", "姐姐")], "没有“名字：”的没有读入，是台词的请接在上一行后面：第 3 行 + 最后几句她没有回答，没有读入：第 11 行"),
    "script with gaps": ("皇上：来\n\n甄嬛：是\n\n皇上：坐\n\n甄嬛：谢\n", "a.txt", [d("来", "是"), d("坐", "谢", history=[["来", "是"]])], "每行是一句话"),
    "script with half-width colons": ("皇上: 来\n时间过得快\n甄嬛: 是\n时间: 夜\n皇上: 坐\n甄嬛: 谢\n", "a.txt", [d("来", "是"), d("坐", "谢")], "接在上一行后面：第 2 行"),
    "script with voices": ("人物：甄嬛、流朱\n- 流朱：小姐\n旁白：那一年\n- 甄嬛OS：我累\n- **甄嬛**（笑）：嗯\n- 流朱：走\n- 甄嬛 VO: 好\n", "a.md", [d("小姐", "我累\n嗯"), d("走", "好", history=[["小姐", "我累\n嗯"]])], "接在上一行后面：第 3 行"),
    "a group chat": ([{"sender": s, "talker": t, "isSelf": s == "我", "content": c} for s, t, c in [("甲", "群", "吃了吗"), ("乙", "群", "走"), ("我", "群", "好"), ("丙", "别处", "来"), ("我", "别处", "是")]], "a.json", [d("吃了吗\n走", "好"), d("来", "是")], "每条是一句话"),
    # marks, few rows, encodings
    "marks": (lines({"prompt": "有座吗？\n\n###\n\n", "completion": " 里边请。 END"}, {"prompt": "来壶茶\n\n###\n\n", "completion": " 这就来。 END"}), "a.jsonl", [d("有座吗？\n\n###\n\n", " 里边请。 END"), d("来壶茶\n\n###\n\n", " 这就来。 END")], "2 条里有 2 条带着别的格式的记号 + ###（2 条） + END（2 条）"),
    "end of text": ([d("一", "二</s>"), d("三", "四<|im_end|>")], "a.json", [d("一", "二</s>"), d("三", "四<|im_end|>")], "2 条里有 2 条带着"),
    "marks of other kinds": ([d("Human: 一\n\nAssistant:", "二"), d("三", "四<｜end▁of▁sentence｜>"), d("五", "六<end_of_turn>")], "a.json", [d("Human: 一\n\nAssistant:", "二"), d("三", "四<｜end▁of▁sentence｜>"), d("五", "六<end_of_turn>")], "3 条里有 3 条带着"),
    "headings are no marks": ([d("一", "### 二\n三"), d("四", "#### 五")], "a.json", [d("一", "### 二\n三"), d("四", "#### 五")], ""),
    "a mark in few rows": ([ROW, ROW2, d("三", "四</s>")], "a.json", [*PAIR, d("三", "四</s>")], ""),
    "Big5": ("問題,回答\n".replace("問題", "question").replace("回答", "answer").encode() + "臺灣話怎麼說呢,這裡是圖書館\n你們從哪裡來的,從學校走過來的\n".encode("big5"), "a.csv", [d("臺灣話怎麼說呢", "這裡是圖書館"), d("你們從哪裡來的", "從學校走過來的")], "BIG5 编码"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_world_are_read(tmp_path, name):
    content, file_name, rows, words = SHAPES[name]
    path = saved(tmp_path, content, file_name)
    table = load_rows(path)
    assert table.to_dict("records") == rows
    for word in words.split(" + "):
        assert word in said(path)
    assert words or not said(path)
    assert f"只有 {len(rows)} 条，" in table.attrs["report"][-1]


# What cannot be read for certain: content, file name, what the message must hold (and, after |, must not).
ADVISED = {
    "other names": ([{"title": "a", "body": "b"}], "a.json", ["这里有的是 title、body", "改名为 output"]),
    "a text": ([{"text": "问：a 答：b"}], "a.json", ["这里有的是 text"]),
    "two that could be it": ([{"question": "a", "answer": "b", "response": "c"}], "a.json", ["改名为 output"]),
    "answers better and worse": ([{"instruction": "a", "output": ["b", "c"]}], "a.json", ["只留好的那个"]),
    "other header": ("提问者的话,甄嬛的话\n有座吗？,里边请。\n", "a.csv", ["“提问者的话”“甄嬛的话”", "改名为 instruction", "改名为 output", "第一行就是对话的"]),
    "other header in a tsv": ("甲方\t乙方\n有座吗？\t里边请。\n", "a.tsv", ["“甲方”“乙方”", "改名为 instruction"]),
    "half a header": ("问题,她说\n有座吗？,里边请。\n", "a.csv", ["改名为 output"]),
    "no header": ("有座吗？,里边请。\n来壶茶,这就来。\n", "a.csv", ["第一行应当是列名", "加一行 instruction,output"]),
    "novel": ("那日雪下得极大。\n她倚着窗，想起从前。\n“小主，”槿汐道，“该用膳了。”\n", "a.txt", ["这是一篇文字，不是一问一答的数据", "名字：台词"]),
    "novel as JSON": ("那日雪下得极大。\n她倚着窗。", "a.json", ["这是一篇文字，不是一问一答的数据"]),
    "YAML": ("- instruction: 你好\n  output: 你好。\n", "a.yaml", ["这是一篇文字，不是一问一答的数据"]),
    "Markdown": ("# 对话\n\n你好\n\n- 一\n- 二\n", "a.md", ["这是一篇文字，不是一问一答的数据"]),
    "README with an example": ('# 数据\n\n```json\n[{"a": 1}]\n```\n', "README.md", ["这是一篇文字"]),
    "HTML": ("<html><body>你好</body></html>", "a.html", ["这是一篇文字，不是一问一答的数据", "重新下载原始文件"]),
    "SRT": ("1\n00:00:01,000 --> 00:00:02,000\n甄嬛：是\n\n2\n00:00:03,000 --> 00:00:04,000\n皇上：来\n", "a.srt", ["这是一篇文字"]),
    "script without her": ("客人：有座吗？\n掌柜：里边请。\n客人：来壶茶\n", "a.txt", ["这是一篇文字，不是一问一答的数据", "客人、掌柜"]),
    "lines without her": ([{"speaker": "客人", "text": "a"}, {"speaker": "掌柜", "text": "b"}], "a.json", ["里面一条对话也没有"]),
    "WeChat without her": (chat("文本,0,友,友,吃了吗,", "文本,0,友,友,还没,"), "a.csv", ["里面一条对话也没有"]),
    "turns within turns": ('{"messages": [' * 400 + "]}" * 400, "a.json", ["里面一条对话也没有"]),
    "WeChat with one question": (chat("文本,0,友,友,吃了吗,", "文本,1,我,友,还没,"), "a.csv", ["只有一个不同的问题"]),
    "nothing but bad answers": ([ROW | {"label": False}], "a.json", ["一条对话也没有", "标着 label: false"]),
    "questions and answers out of step": ([{"instruction": ["a", "b"], "output": ["c"]}], "a.json", ["instruction", "问的要比答的多一句"]),
    "context that ends with her": ([{"context": ["a", "b"], "response": "c"}], "a.json", ["问的要比答的多一句"]),
    "answers of SQuAD that differ": ([{"question": "a", "answers": {"text": ["b", "c"]}}], "a.json", ["只留好的那个"]),
    "questions as keys": ({"甲": ["a", "b"], "乙": ["c", "d"]}, "a.json", ["最外层是一个对象"]),
    "a tree of answers": ([{"message_id": 1, "parent_id": None, "role": "prompter", "text": "a"}, {"message_id": 2, "parent_id": 1, "role": "assistant", "text": "b"}], "a.json", ["parent_id", "有几个回答的只留好的"]),
    "newest first": (chat("文本,1,我,友,c,2024/1/1 12:40", "文本,0,友,友,b,2024/1/1 12:20", "文本,1,我,友,a,2024/1/1 12:00"), "a.csv", ["第 2 条的 CreateTime", "从早到晚"]),
    "all cut by the viewer": ({"rows": [{"row": ROW, "truncated_cells": ["output"]}]}, "a.json", ["一条对话也没有", "截短了这一条"]),
    "several lists": ({"正事": [ROW], "闲聊": [ROW2]}, "a.json", ["最外层是一个对象"]),
    "settings": ({"name": "甄嬛", "age": "17"}, "a.json", ["最外层是一个对象"]),
    "columns of two lengths": ({"instruction": ["a", "b"], "output": ["c"]}, "a.json", ["不一样长"]),
    "one object": (GOOD, "a.json", ["只有一个不同的问题"]),
    "history that is prose": ([GOOD | {"history": "从前"}], "a.json", ["history", "应当是一个数组"]),
    "history out of step": ([GOOD | {"history": [["a"]]}], "a.json", ["history"]),
    "no header, no punctuation": ("有座吗,里边请\n来壶茶,这就来\n", "a.csv", ["第一行应当是列名"]),
    "Guest and host": ("Guest: hi\nHost: hello\n", "a.txt", ["这是一篇文字"]),
    "picture in a turn": ([{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A1]}], "a.json", ["应当是一段文字"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVISED)
def test_what_is_not_certain_is_refused_with_advice(tmp_path, name):
    content, file_name, words = ADVISED[name]
    message = str(refused(saved(tmp_path, content, file_name)))
    for word in words:
        assert (word.lstrip("|") in message) != word.startswith("|"), message


LONG = [[f"问{number}", f"答{number}"] for number in range(130)]
AGAIN = {
    "dialogues": [[U, A1, U2, A2], GOOD, [U2, A2, U, A1], [U, A1, U2, A2], ROW],
    "history": [ROW2 | {"history": [["有座吗？", "里边请。"]]}, GOOD, PAY | {"history": [["一", "二"]]}],
    "history after its row": [TWO_AFTER, ROW, OTHER],
    "input": [d("译", "a", "甲"), d("译", "b", "乙", [["译\n甲", "a"]]), d("", "c", "丙"), d("丁", "d", history=[["丙", "c"]])],
    "more turns than a history holds": [LONG, GOOD],
    "long history": [GOOD | {"history": LONG}, OTHER, OTHER | {"history": [*LONG, ["又", "来"]]}],
    "a bad answer in a dialogue that is longer": [{"messages": [U, A1, U2, A2 | {"weight": 0}] + [U, A1, U2, A2] * 60}, GOOD, ROW2],
    "questions that are names of roles": [turns(*zip("ua" * 3, said, strict=True)) for said in (["AI", "一", "助手", "二", "走", "三"], ["你好", "四", "user", "五", "走", "六"], ["bot", "七", "来", "八", "坐", "九"])],
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
def test_rows_written_as_json_are_read_as_the_same_rows(tmp_path, name):
    table = load_rows(saved(tmp_path, AGAIN[name]))
    for indent in (1, None):
        path = tmp_path / "filled.json"
        table.to_json(path, orient="records", force_ascii=False, indent=indent)
        again = load_rows(path)
        assert again.to_dict("records") == table.to_dict("records")
        assert not any("多轮对话每个回答" in sentence for sentence in again.attrs["report"])


def test_a_text_in_a_json_of_one_line_is_no_header(tmp_path):
    rows = [GOOD | {"instruction": "有 prompt, question, answer, text 吗"}, OTHER]
    assert texts(load_rows(saved(tmp_path, rows))) == rows


def test_placeholders_are_offered_and_filled(tmp_path):
    rows = [d("{{user}}问", "我是 {{name}}"), ROW2 | {"history": [["你是", "{{name}}"]]}, ROW, ROW2]
    table = load_rows(saved(tmp_path, rows))
    assert table.attrs["placeholders"] == {"{{user}}": 1, "{{name}}": 2}
    filled = fill_placeholders(table, {"{{name}}": "甄嬛", "{{nobody}}": "无"})
    assert texts(fill_placeholders(table, {})) == texts(table)
    assert "甄嬛" not in str(table.values) and "{{name}}" not in str(filled.values)
    assert filled.loc[2, "history"].tolist() == [[], [["你是", "甄嬛"]]]
    assert filled.attrs["placeholders"] == {"{{user}}": 1}
    report = "\n".join(filled.attrs["report"])
    assert (
        "占位符 {{name}} 换成了“甄嬛”：第 1、2 条。" in report
        and "占位符 {{name}} 还没有" not in report
    )
    assert "占位符 {{user}}" in report and "占位符 {{name}}" in "\n".join(table.attrs["report"])


def test_ten_rows_are_not_few(tmp_path):
    path = saved(tmp_path, [d(f"问{number}", "答") for number in range(10)])
    assert load_rows(path).attrs["report"] == []


def test_an_endless_dialogue_keeps_its_last_hundred_turns(tmp_path):
    spoken = [[f"问{number}", f"答{number}"] for number in range(3000)]
    table = load_rows(saved(tmp_path, [spoken]))
    assert len(table) == 3000 and table["history"].iloc[50] == spoken[:50]
    assert table["history"].iloc[-1] == spoken[-101:-1]
    assert any("最多 100 轮" in sentence for sentence in table.attrs["report"])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "utf-16"])
def test_damaged_file_ends_in_a_table_or_a_dataset_error(tmp_path, name, encoding):
    path = tmp_path / name
    write(path, 3)
    good = path.read_text(encoding="utf-8").encode(encoding)
    chance, ends = random.Random(f"{name} {encoding}"), {"read": 0, "refused": 0}
    for _ in range(150):
        raw = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(raw))
            change = chance.choice(("flip", "drop", "insert", "cut"))
            if change == "flip":
                raw[place] = chance.randrange(256)
            elif change == "drop":
                del raw[place : place + chance.randint(1, 9)]
            elif change == "insert":
                raw[place:place] = chance.choice(
                    (b'"', b",", b"\n", b"{", b"]", b"\0", b"\xff", b"\\")
                )
            elif chance.random() < 0.2:
                del raw[place + 1 :]
            if not raw:
                break
        path.write_bytes(raw)
        try:
            assert len(load_rows(path).columns) == 4
            ends["read"] += 1
        except DatasetError as error:
            str(error).encode()
            ends["refused"] += 1
    assert ends["refused"] > 30


@pytest.mark.parametrize("name", [name for name in SHAPES if type(SHAPES[name][0]) in (dict, list)])
def test_shape_with_a_wrong_part_ends_in_a_table_or_a_dataset_error(tmp_path, name):
    chance, path = random.Random(name), tmp_path / "a.json"
    wrong = (None, 0, "", [], {}, "user", "甄嬛", ["a"], [["a", "b"]], [U], {"role": "x"}, "[1]")

    def spoilt(value, depth=0):
        if depth and chance.random() < 0.15:
            return chance.choice(wrong)
        if type(value) is dict:
            return {key: spoilt(part, depth + 1) for key, part in value.items()}
        return [spoilt(part, depth + 1) for part in value] if type(value) is list else value

    for _ in range(25):
        path.write_text(json.dumps(spoilt(SHAPES[name][0]), ensure_ascii=False), encoding="utf-8")
        try:
            table = load_rows(path)
        except DatasetError as error:
            str(error).encode()
            continue
        said = [*table[["instruction", "input", "output"]].to_numpy().ravel()]
        said += [text for turns in table["history"] for turn in turns for text in turn]
        assert all(isinstance(text, str) for text in said)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_memory_stays_below_four_times_the_file(tmp_path, suffix):
    path = tmp_path / f"large{suffix}"
    write(path, 100_000)  # some 20 MB
    seconds, growth, rows = measure(path)
    assert rows == 100_000
    assert growth < 4 * path.stat().st_size
    assert seconds < 30
