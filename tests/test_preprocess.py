import json
import os
import random
import sys
import threading
import time

import pandas as pd
import pytest
from benchmarks.read_rows import measure, write

from huanhuan.preprocess import (
    DatasetError,
    asks_identity,
    load_rows,
    normalised,
    split_by_instruction,
)

GOOD = {"instruction": "你好", "input": "", "output": "你好。"}
OTHER = {"instruction": "你是谁", "input": "", "output": "我是甄嬛。"}
A = json.dumps(GOOD, ensure_ascii=False)
B = json.dumps(OTHER, ensure_ascii=False)
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
    return "\n".join(load_rows(path).attrs["report"])


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
    "one row": ([GOOD], "a.json", 0, "instruction", "至少写两个不同的问题"),
    "one question": ([GOOD, GOOD | {"instruction": "你好 "}], "a.json", 0, "instruction", "验证集"),
    "excel": (b"PK\x03\x04\x14\0\x06\0", "a.csv", 0, "", "另存为“CSV UTF-8"),
    "old excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a.xls", 0, "", "另存为“CSV UTF-8"),
    "pdf": (b"%PDF-1.7\n", "a.json", 0, "", "抄进表格"),
    "rtf": (b"{\\rtf1\\ansi", "a.json", 0, "", "存成 JSON"),
    "png": (b"\x89PNG\r\n\x1a\n", "a.json", 0, "", "图片，不是文字"),
    "gzip": (b"\x1f\x8b\x08\0", "a.json", 0, "", "请先解压"),
    "parquet": (b"PAR1\x15\0", "a.json", 0, "", "请导出成 CSV 或 JSON"),
    "binary": (bytes(range(256)) * 9, "a.json", 0, "", "二进制文件"),
    "all NUL": (bytes(300), "a.json", 0, "", "二进制文件"),
    "web page": ("<!DOCTYPE html><html></html>", "a.json", 0, "", "重新下载原始文件"),
    "LFS pointer": ("version https://git-lfs.github.com/spec/v1", "a.json", 0, "", "占位文件"),
    "plain text": ("你好", "a.json", 0, "", "JSON 文件应当是 ["),
    # encodings
    "a broken byte": (f"[{A},\n{B}]".encode()[:-3] + b"\xff\xff]", "a.json", 0, "", "第 2 行有字节"),
    "cut within a character": (f"[{A},{B}]".encode()[:22], "a.json", 0, "", "请重新下载"),
    "Big5": ('[{"instruction": "臺灣話怎麼說呢", "output": "這裡是圖書館"}]'.encode("big5"), "a.json", 0, "", "Big5"),
    "Latin-1": ('[{"instruction": "déjà vu", "output": "ça va"}]'.encode("latin-1"), "a.json", 0, "", "另存为 UTF-8"),
    "half a UTF-16": (f"[{A},{B}]".encode("utf-16")[:-1], "a.json", 0, "", "UTF-16-LE 解不开"),
    # the outermost value
    "wrapper": ({"data": [GOOD, OTHER]}, "a.json", 0, "", "只留下它后面的数组"),
    "wrapper on several lines": (f'{{"data": [\n{A},\n{B}\n]}}', "a.json", 0, "", "“data”里"),
    "single object": (GOOD, "a.json", 0, "", "最外面用 [ ] 括起来"),
    "single messages": (turns(("u", "a"), ("a", "b")), "a.json", 0, "", "最外面用 [ ] 括起来"),
    "empty object": ({}, "a.json", 0, "", "应当是一个数组"),
    "text": ('"你好"', "a.json", 0, "", "最外层是一段文字"),
    "number": ("7", "a.json", 0, "", "最外层是 7"),
    "null": ("null", "a.json", 0, "", "最外层是 null"),
    "columns": ({"instruction": {"0": "a"}, "output": {"0": "b"}}, "a.json", 0, "", "records"),
    "objects one after another": (f"{A},\n{B}\n", "a.json", 1, "", "行尾不要逗号"),
    "objects on several lines": (json.dumps(GOOD, indent=1) + "\n" + A, "a.json", 0, "", "加英文逗号"),
    # JSON syntax
    "trailing comma": (f"[{A},{B},]", "a.json", 2, "", "多了一个逗号"),
    "trailing comma in a row": (f'[{A},{{"instruction": "a", "output": "b",}}]', "a.json", 2, "", "多了一个逗号"),
    "two commas": (f"[{A},,{B}]", "a.json", 2, "", "多了一个逗号"),
    "no comma between rows": (f"[{A}\n{B}]", "a.json", 1, "", "少了一个英文逗号"),
    "no comma between fields": ('[{"instruction": "a" "output": "b"}]', "a.json", 1, "", "少了一个英文逗号"),
    "no colon": ('[{"instruction" "a"}]', "a.json", 1, "", "少了英文冒号"),
    "single quotes": (f"[{A},\n{{'instruction': 'a'}}]", "a.json", 2, "", "单引号"),
    "full-width quotes": (f"[{A},{{“instruction”: “a”}}]", "a.json", 2, "", "全角的"),
    "full-width end quote": ('[{"instruction": "a”, "output": "b"}]', "a.json", 1, "", "结尾的引号是全角"),
    "full-width colon": ('[{"instruction"："a"}]', "a.json", 1, "", "英文冒号"),
    "full-width comma": (f"[{A}，{B}]", "a.json", 1, "", "英文逗号"),
    "full-width bracket": (f"【{A}】", "a.json", 0, "", "英文的 [ ]"),
    "comment": (f"[{A}, // 第二条\n{B}]", "a.json", 2, "", "不能写注释"),
    "comment first": (f"# 对话\n[{A}]", "a.json", 0, "", "不能写注释"),
    "line break in a text": ('[{"instruction": "a\nb", "output": "c"}]', "a.json", 1, "", "写成 \\n"),
    "tab in a text": ('[{"instruction": "a\tb", "output": "c"}]', "a.json", 1, "", "写成 \\t"),
    "control in a text": ('[{"instruction": "a\x07b", "output": "c"}]', "a.json", 1, "", "控制字符"),
    "quote in a text": ('[{"instruction": "他说"好"吧", "output": "c"}]', "a.json", 1, "", '写成 \\"'),
    "backslash": ('[{"instruction": "C:\\data", "output": "c"}]', "a.json", 1, "", "写成 \\\\"),
    "None": ('[{"instruction": "a", "output": None}]', "a.json", 1, "", "None 是 Python"),
    "True": ('[{"instruction": "a", "output": True}]', "a.json", 1, "", "Python 的写法"),
    "nan": ('[{"instruction": "a", "output": nan}]', "a.json", 1, "", "这里没有内容"),
    "ellipsis": (f"[{A}, ...]", "a.json", 2, "", "省略号"),
    "key without quotes": ('[{instruction: "a"}]', "a.json", 1, "", "带英文双引号的字段名"),
    "brackets crossed": ('[{"instruction": "a"]', "a.json", 1, "", "没有配对"),
    "cut in a text": (f"[{A},{B}"[:-5], "a.json", 2, "", "没有结束的引号"),
    "cut in a row": (f"[{A},{B}"[:-1], "a.json", 2, "", "文件不完整"),
    "cut between rows": (f"[{A}", "a.json", 1, "", "文件不完整"),
    "cut after the bracket": ("[", "a.json", 1, "", "文件不完整"),
    "text after the end": (f"[{A},{B}]\n完", "a.json", 0, "", "删掉后面多出来的"),
    "several arrays": (f"[{A}]\n[{B}]", "a.json", 0, "", "并成一个"),
    "nested too deeply": ("[" * 100_000, "a.json", 1, "", "括号套得太深"),
    # JSON lines
    "bad line": (f"{A}\n\n你好\n{B}\n", "a.jsonl", 2, "", "文件第 3 行第 1 个字符"),
    "first line cut off": (f"{A[:-1]}\n{B}\n", "a.jsonl", 1, "", "文件第 1 行"),
    "two on a line": (f"{A}\n{B}{B}\n", "a.jsonl", 2, "", "删掉后面多出来的"),
    "line cut off": (f"{A}\n{B[:-1]}", "a.jsonl", 2, "", "文件第 2 行"),
    # rows
    "row a text": ([GOOD, "你好"], "a.json", 2, "", '应当是 {"instruction"'),
    "row a list": ([GOOD, ["你好", "好"]], "a.json", 2, "", "一个数组"),
    "row null": ([GOOD, None], "a.json", 2, "", "null"),
    "output null": ([GOOD, OTHER | {"output": None}], "a.json", 2, "output", "请写上文字"),
    "input null": ([GOOD, OTHER | {"input": None}], "a.json", 2, "input", 'input 没有内容就写 ""'),
    "integer": ([GOOD, OTHER | {"instruction": 7}], "a.json", 2, "instruction", '写成 "7"'),
    "float": ('[{"instruction": "a", "output": 1.50}]', "a.json", 1, "output", '写成 "1.50"'),
    "endless integer": (f'[{{"instruction": "a", "output": {"9" * 5000}}}]', "a.json", 1, "output", "请加上引号"),
    "NaN": ('[{"instruction": "a", "output": NaN}]', "a.json", 1, "output", "NaN"),
    "true": ([OTHER | {"output": True}], "a.json", 1, "output", '写成 "true"'),
    "list": ([GOOD, OTHER | {"input": ["a"]}], "a.json", 2, "input", "合成一段文字"),
    "object": ([GOOD, OTHER | {"output": {"a": "b"}}], "a.json", 2, "output", "只留一段文字"),
    "no output": ([GOOD, {"instruction": "a"}], "a.json", 2, "output", "缺少这个字段，请补上"),
    "misspelt": ([{"instuction": "a", "output": "b"}], "a.json", 1, "instruction", "instuction → instruction？"),
    "capital": ([{"instruction": "a", "Output": "b"}], "a.json", 1, "output", "Output → output？"),
    "misspelt input": ([OTHER | {"inputs": "b"}, {"instruction": "a", "inptu": "b", "output": "c"}], "a.json", 2, "input", "inptu → input？"),
    "Chinese field": ([{"instruction": "a", "回答": "b"}], "a.json", 1, "output", "回答 → output？"),
    "prompt without its answer": ([{"prompt": "a", "output": "b"}], "a.json", 1, "instruction", "prompt → instruction？"),
    "repeated key": (f'[{A},{{"instruction": "a", "output": "b", "output": "c"}}]', "a.json", 2, "output", "请只留一个"),
    "nothing asked": ([GOOD, OTHER | {"instruction": " "}], "a.json", 2, "instruction", "对她说的话"),
    "nothing answered": ([GOOD, OTHER | {"output": " \n"}], "a.json", 2, "output", "她的回答"),
    "NUL in a text": ([GOOD, OTHER | {"output": "a\0"}], "a.json", 2, "output", "第 2 个字符是看不见的控制字符 U+0000"),
    "C1 control": ([GOOD, OTHER | {"output": "a\x85"}], "a.json", 2, "output", "U+0085，请删掉"),
    "lone surrogate": ('[{"instruction": "a", "output": "好\\ud83d"}]', "a.json", 1, "output", "第 2 个字符是半个字符 U+D83D"),
    "garbled": ([GOOD, OTHER | {"input": "�"}], "a.json", 2, "input", "乱码 U+FFFD"),
    # dialogues in turns
    "two users": ([turns(("u", "a"), ("u", "b"), ("a", "c"))], "a.json", 1, "messages", "第 2 句是 user 说的，这里应当轮到 assistant"),
    "assistant first": ([turns(("a", "a"), ("u", "b"))], "a.json", 1, "messages", "第 1 句是 assistant"),
    "user last": ([turns(("u", "a"), ("a", "b"), ("u", "c"))], "a.json", 1, "messages", "补上回答"),
    "no turns": ([{"messages": []}], "a.json", 1, "messages", "最后一句应当是 assistant"),
    "system alone": ([turns(("s", "a"))], "a.json", 1, "messages", "补上回答"),
    "unknown role": ([turns(("tool", "a"))], "a.json", 1, "messages", "角色不认识：tool"),
    "role a list": ([turns((["user"], "a"))], "a.json", 1, "messages", "角色不认识：一个数组"),
    "content null": ([turns(("u", "a"), ("a", None))], "a.json", 1, "messages", "第 2 句的内容应当是一段文字，这里却是 null"),
    "content a list": ([turns(("u", [{"type": "text"}]), ("a", "b"))], "a.json", 1, "messages", "合成一段文字"),
    "content blank": ([turns(("u", "a"), ("a", " "))], "a.json", 1, "messages", "第 2 句是空的"),
    "content garbled": ([turns(("u", "a�"), ("a", "b"))], "a.json", 1, "messages", "第 1 句的内容第 2 个字符是乱码"),
    "turn a text": ([{"conversations": ["你好"]}], "a.json", 1, "conversations", '应当是 {"role": "user"'),
    "turns a text": ([{"messages": "你好"}], "a.json", 1, "messages", "应当是一个数组"),
    "turn with a repeated key": ('[{"messages": [{"role": "user", "role": "user", "content": "a"}]}]', "a.json", 1, "messages", "字段 role 写了不止一次"),
    # CSV
    "no header": ("你好,,你好。\n你是谁,,我是甄嬛。\n", "a.csv", 0, "", "第一行应当是"),
    "full-width header": ("instruction，input，output\na,,b\n", "a.csv", 0, "", "英文逗号隔开的列名"),
    "misspelt header": ("instuction,input,output\na,,b\n", "a.csv", 0, "instruction", "instuction → instruction？"),
    "Chinese header": ("instruction,回答\na,b\nc,d\n", "a.csv", 0, "output", "回答 → output？"),
    "repeated column": ("instruction,output,output\na,b,c\n", "a.csv", 0, "output", "出现了 2 次"),
    "too many cells": (HEAD + "a,,b\nc,,d,e\n", "a.csv", 2, "", "文件第 3 行有 4 格"),
    "too few cells": (HEAD + "a,,b\nc,d\n", "a.csv", 2, "", "文件第 3 行有 2 格，列名却有 3 个"),
    "unclosed quote": (HEAD + 'a,,b\nc,,"d\ne,,f\n', "a.csv", 2, "", "文件第 3 行起有一个引号直到文件末尾"),
    "quote within quotes": (HEAD + 'a,,b\nc,,"他说"好"吧"\n', "a.csv", 2, "", '写成两个 ""'),
    "space before a quote": (HEAD + 'a,,b\nc,, "d"\n', "a.csv", 2, "", "请删掉空格"),
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
        (f"[\n{A}\n\n  {B}]", "文件第 4 行第 3 个字符"),
        (f'[\n{A},\n{{"output": None}}]', "文件第 3 行第 12 个字符"),
    ],
)
def test_place_of_a_syntax_error(tmp_path, content, says):
    assert says in str(refused(saved(tmp_path, content)))


def test_every_problem_is_listed_twenty_are_shown(tmp_path):
    error = refused(saved(tmp_path, [{"instruction": "a"}] * 25))
    assert [problem[0] for problem in error.problems] == list(range(1, 26))
    assert "第 20 条" in str(error) and "第 21 条" not in str(error) and "还有 5 处" in str(error)


def test_problems_of_all_kinds_come_together(tmp_path):
    rows = [{"instruction": 7, "input": None}, GOOD, "你好", OTHER | {"output": "\x07"}]
    error = refused(saved(tmp_path, rows))
    places = [(1, "output"), (1, "instruction"), (1, "input"), (3, ""), (4, "output")]
    assert [problem[:2] for problem in error.problems] == places


def test_broken_syntax_is_named_first_and_what_came_before_is_not_lost(tmp_path):
    error = refused(saved(tmp_path, f'[{A}, {{"instruction": "a"}}, {B} {B}]'))
    assert [problem[:2] for problem in error.problems] == [(3, ""), (2, "output")]


def test_of_very_many_problems_a_thousand_are_kept_and_all_are_counted(tmp_path):
    error = refused(saved(tmp_path, "{}\n" * 5000, "a.jsonl"))
    assert len(error.problems) == 1000 and error.count == 10_000
    assert "还有 9980 处" in str(error)


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    assert "找不到" in str(refused(tmp_path / "nowhere.json"))
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
    assert list(table.columns) == ["instruction", "input", "output"]
    assert table.to_dict("records") == wanted
    assert list(table.index) == [1, 2, 3]
    assert table.attrs["report"] == []
    lines = "\n".join(json.dumps(row) for row in rows)
    assert load_rows(saved(tmp_path, lines, "a.jsonl")).to_dict("records") == wanted
    pd.DataFrame(wanted).to_csv(tmp_path / "a.csv", index=False, lineterminator="\r\n")
    table = load_rows(tmp_path / "a.csv")
    assert table.to_dict("records") == wanted and table.attrs["report"] == []


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("utf-8", ""),
        ("utf-8-sig", "BOM"),
        ("utf-16", "UTF-16-LE"),
        ("utf-16-le", "UTF-16-LE"),
        ("utf-16-be", "UTF-16-BE"),
        ("utf-32", "UTF-32-LE"),
        ("gbk", "GBK"),
        ("gb18030", "GBK"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_encodings(tmp_path, encoding, says, name):
    content = f"[{A},{B}]" if name == "a.json" else HEAD + "你好,,你好。\n你是谁,,我是甄嬛。\n"
    path = saved(tmp_path, content.encode(encoding), name)
    assert load_rows(path).to_dict("records") == [GOOD, OTHER]
    assert says in said(path) and bool(said(path)) == bool(says)


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
        (f"{A}\n{B}\n", "a.json", "JSON Lines"),
        (f"[{A},{B}]", "a.jsonl", "JSON 数组"),
        (f"[{A},{B}]", "a.txt", "JSON 数组"),
        (f"[{A},{B}]", "a.csv", "JSON 数组"),
        (HEAD + "你好,,你好。\n你是谁,,我是甄嬛。", "a.json", "CSV"),
        (f"{A}\n\n{B}\n\n", "a.jsonl", "空行，已跳过：第 2、4 行"),
        (HEAD + "\n你好,,你好。\n,,\n你是谁,,我是甄嬛。\n", "a.csv", "空行，已跳过：第 2、4 行"),
        (HEAD.replace(",", ";") + "你好;;你好。\n你是谁;;我是甄嬛。", "a.csv", "分号"),
        (HEAD.replace(",", "\t") + "你好\t\t你好。\r\n你是谁\t\t我是甄嬛。", "a.csv", "制表符"),
        (HEAD.strip() + "\r你好,,你好。\r你是谁,,我是甄嬛。\r", "a.csv", ""),
        ('"instruction","input","output"\n"你好","","你好。"\n你是谁,,我是甄嬛。', "a.csv", ""),
        ([GOOD | {"source": "书"}, OTHER], "a.json", "字段 source 课程用不到，没有读入：第 1 条"),
        ([{"prompt": "你好", "response": "你好。"}, OTHER], "a.json", "prompt、response 换成了"),
        ([{"prompt": "你好", "completion": "你好。"}, OTHER], "a.json", "completion 换成了"),
        ("question,answer\n你好,你好。\n你是谁,我是甄嬛。\n", "a.csv", "question、answer 换成了"),
        ([turns(("u", "你好"), ("a", "你好。")), OTHER], "a.json", "messages 里的一问一答换成了"),
        (
            [turns(("s", "你是甄嬛"), ("u", "你好"), ("a", "你好。")), OTHER],
            "a.json",
            "system 的话没有读入，课程有自己的系统提示：第 1 条",
        ),
        (
            [{"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好。"}]}]
            + [OTHER],
            "a.json",
            "conversations 里的一问一答换成了",
        ),
    ],
)  # fmt: skip
def test_other_ways_of_writing_the_same_are_read_and_reported(tmp_path, content, name, says):
    path = saved(tmp_path, content, name)
    table = load_rows(path)
    assert table.to_dict("records") == [GOOD, OTHER]
    assert says in said(path) and bool(said(path)) == bool(says)
    assert all(sentence.endswith("。") for sentence in table.attrs["report"])


def test_dialogue_of_several_turns_becomes_several_rows(tmp_path):
    spoken = turns(("u", "一"), ("a", "二"), ("s", "别的"), ("u", "三"), ("a", "四"))
    spoken["messages"][1]["weight"] = 0
    table = load_rows(saved(tmp_path, [GOOD, spoken, OTHER]))
    assert list(table.index) == [1, 2, 2, 3]
    assert table.loc[2].to_dict("records") == [
        {"instruction": "一", "input": "", "output": "二"},
        {"instruction": "三", "input": "", "output": "四"},
    ]
    report = "\n".join(table.attrs["report"])
    assert "前面说过的不带过来：第 2 条" in report
    assert "字段 messages.weight 课程用不到" in report


def test_duplicates_and_long_rows_are_kept_and_reported(tmp_path):
    rows = [GOOD, OTHER] * 20 + [OTHER | {"output": "长" * 2001}]
    table = load_rows(saved(tmp_path, rows))
    assert len(table) == 41
    alike, long = sorted(table.attrs["report"])[::-1]
    assert "完全相同" in alike and "第 3、4、5、6、7、8、9、10、11、12 等 38 条" in alike
    assert "output 超过 2000 个字" in long and long.endswith("第 41 条。")


def test_long_cell_of_a_csv_is_read(tmp_path):
    path = saved(tmp_path, HEAD + "你好,,你好。\n你是谁,," + "长" * 200_000)
    assert load_rows(path)["output"].str.len().tolist() == [3, 200_000]


def test_field_names_that_never_end_do_not_fill_the_report(tmp_path):
    rows = [GOOD | {f"字段{number}": ""} for number in range(1500)] + [OTHER]
    report = load_rows(saved(tmp_path, rows)).attrs["report"]
    assert len(report) == 102 and "字段 字段99 课程用不到，没有读入：第 100 条。" in report
    assert any("别的字段" in sentence and "等 1400 条" in sentence for sentence in report)
    assert any("完全相同" in sentence and "等 1499 条" in sentence for sentence in report)


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
            assert list(load_rows(path).columns) == ["instruction", "input", "output"]
            ends["read"] += 1
        except DatasetError as error:
            str(error).encode()
            ends["refused"] += 1
    assert ends["refused"] > 30


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_memory_stays_below_four_times_the_file(tmp_path, suffix):
    path = tmp_path / f"large{suffix}"
    write(path, 100_000)  # some 20 MB
    seconds, growth, rows = measure(path)
    assert rows == 100_000
    assert growth < 4 * path.stat().st_size
    assert seconds < 30


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
