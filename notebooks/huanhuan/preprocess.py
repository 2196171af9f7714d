"""Room 02: read, check and split a dataset."""

import csv
import difflib
import json
import random
import re
import stat
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from huanhuan import CourseError
from huanhuan.persona import NAME

FIELDS = ("instruction", "input", "output")
SHOWN = 20  # problems listed in a message; the rest are counted
KEPT = 1000  # problems held in memory, however bad the file is
NAMES = 100  # unused fields named in the report
NAMED = 10  # row numbers named in a sentence of the report; the rest are counted
LONG = 2000  # characters in a field; beyond, the report says so

# Shapes that other projects use, and what learners are likely to call our fields.
SHAPES = (
    ("messages",),
    ("conversations",),
    ("prompt", "input", "response"),
    ("prompt", "input", "completion"),
    ("question", "input", "answer"),
)
ROLES = {role: role for role in ("user", "assistant", "system")}
ROLES |= {"human": "user", "gpt": "assistant"}
MEANT = {
    "instruction": {"prompt", "question", "query", "问题", "问", "提问", "指令", "用户"},
    "input": {"输入"},
    "output": {"response", "completion", "answer", "回答", "答", "答案", "回复", "输出"},
}
KNOWN = {*FIELDS, *sum(SHAPES, ()), *set.union(*MEANT.values())}
EXAMPLE = '{"instruction": "…", "input": "", "output": "…"}'
FORMATS = {"json": "JSON 数组", "jsonl": "JSON Lines（每行一个对象）", "csv": "CSV 表格"}

BOMS = {  # UTF-32 first: its mark begins like that of UTF-16
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
TO_CSV = "请用原来的程序打开，另存为“CSV UTF-8（逗号分隔）”或导出成 JSON，再选那个文件。"
UNPACK = "请先解压，再选里面的 JSON 或 CSV 文件。"
MAGIC = (  # how files that are no text begin
    ((b"PK\x03\x04",), "Excel 表格（.xlsx）或 zip 压缩包", TO_CSV + "压缩包请先解压。"),
    ((b"\xd0\xcf\x11\xe0",), "旧版 Excel 或 Word 文件", TO_CSV),
    ((b"{\\rtf", b"%PDF"), "排版文档（RTF 或 PDF）", "请把对话抄进表格，另存为 CSV，或存成 JSON。"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "图片", "请另找 JSON 或 CSV 格式的数据。"),
    ((b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf"), "压缩包", UNPACK),
    ((b"PAR1", b"SQLite"), "数据库或 Parquet 表格", "请导出成 CSV 或 JSON，再选那个文件。"),
)  # fmt: skip

_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_BAD = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_blank = re.compile(r"[ \t\r\n]*").match  # what JSON calls white space, nothing else

# Where JSON breaks off: what the parser says (beginning), what stands before, what stands there
# (patterns), and the remedy. The first that fits is given.
NOTHING = '请写上文字；input 没有内容就写 ""。'
REMEDIES = (
    ("Nested", "", "", f"括号套得太深了，一条对话应当是 {EXAMPLE}。"),
    ("Unterminated", "", "", '这段文字没有结束的引号 "：请补上；后面本来还有内容的，是文件不完整，请重新下载或导出。'),
    ("End", "", "", "写到这里就断了：文件不完整，请重新下载或导出；自己写的，请补上缺的括号。"),
    ("Invalid control", "", r"[\r\n]", '文字里不能直接换行，请写成 \\n；文字到此为止的，请在行尾补上引号 "。'),
    ("Invalid control", "", r"\t", "文字里不能直接写制表符（Tab），请写成 \\t。"),
    ("Invalid control", "", "", "文字里有看不见的控制字符，请删掉。"),
    ("Invalid \\", "", "", "反斜杠 \\ 后面只能跟 n、t、u 等几种写法；要写反斜杠本身，请写成 \\\\。"),
    ("After", r"\]$", r"\[", "这里又开始了一个数组：请把几个数组并成一个，只留一对 [ ]，各条之间用英文逗号。"),
    ("After", r"\}$", ",", "每行一个对象的文件，行尾不要逗号，请删掉；或在最外面加上 [ ]，成为一个数组。"),
    ("", "", r"//|/\*|#", "JSON 里不能写注释，请删掉。"),
    ("After", "", "", "内容到这里已经结束，请删掉后面多出来的东西。"),
    ("", r",$", r"[\]},]", "多了一个逗号：最后一项后面没有逗号，请删掉。"),
    ("", "", r",\s*[\]}]", "多了一个逗号：最后一项后面没有逗号，请删掉。"),
    ("", "", "'", '这里用了单引号，请改成英文双引号 "。'),
    ("", "", "[“”‘’＂「」『』]", '这里的引号是全角的，请改成英文双引号 "。'),
    ("Expecting ','", r"[”’＂]\s*[,，:：}].*$", "", '前面那段文字结尾的引号是全角的，请改成英文双引号 "。'),
    ("", "", "[，、；;]", "这里的标点应当是英文逗号 , （全角逗号、顿号、分号都不行）。"),
    ("", "", "[：=]", "这里的标点应当是英文冒号 : （全角冒号、等号都不行）。"),
    ("", "", "[【】［］｛｝()（）]", "这里的括号应当是英文的 [ ] 或 { }。"),
    ("", "", r"None\b", f"None 是 Python 的写法，{NOTHING}"),
    ("", "", r"(True|False)\b", "True、False 是 Python 的写法，这里请写带引号的文字。"),
    ("", "", r"(nan|NAN|inf|undefined|NULL)\b", f"这里没有内容，{NOTHING}"),
    ("", "", r"…|\.\.", "省略号不是 JSON，请删掉，或写出全部对话。"),
    ("", "", r"</?[!A-Za-z]", "这是网页（HTML）的写法：可能把网页当数据存下来了，请重新下载原始文件。"),
    ("", "", "version https://git-lfs", "这是 Git LFS 的占位文件，不是数据，请下载原始文件。"),
    ("", "", r"\0", "这里是空字节（NUL）：文件多半没有下载完整，请重新下载或导出。"),
    ("Expecting ','", "", r'["{\[]', "前面少了一个英文逗号 , ，请补上。"),
    ("Expecting ','", "", r"[\]}]", "括号没有配对：{ 要用 } 结束，[ 要用 ] 结束。"),
    ("Expecting ','", "", "", '前面那段文字里多半有英文双引号，请写成 \\" 或改用“”；也可能少了逗号。'),
    ("Expecting ':'", "", "", "字段名和内容之间少了英文冒号 : ，请补上。"),
    ("Expecting prop", "", "", '这里应当是带英文双引号的字段名，如 "output"；前一条要先用 } 结束。'),
    ("", "", "", f"JSON 文件应当是 [{EXAMPLE}, …]，请检查这里的逗号、引号和括号。"),
)  # fmt: skip


def _shown(message: str) -> str:
    """`message`, which quotes the file, without what a terminal could not print."""
    return _BAD.sub("\ufffd", message)


class DatasetError(CourseError):
    """A dataset that cannot be used.

    `problems` lists ``(row, field, message)``; rows count from 1, row 0 is the file as a whole.
    Only the first 1000 are kept (KEPT); `count` is the number of all.
    """

    def __init__(self, path: Path, problems: list[tuple[int, str, str]], count: int = 0):
        self.problems, self.count = problems, max(count, len(problems))
        lines = []
        for row, field, message in problems[:SHOWN]:
            where = "的 ".join([f"第 {row} 条"] * bool(row) + [field] * bool(field))
            lines.append(f"{where}：{message}" if where else message)
        if self.count > SHOWN:
            lines.append(f"……另外还有 {self.count - SHOWN} 处问题")
        body = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)
        super().__init__(_shown(f"数据集 {path.name} 用不了，什么都没有写入。{body}"))


class _Log:
    """What is found while a file is read: problems, and notes for the report."""

    def __init__(self, path: Path):
        self.path, self.problems, self.count = path, [], 0
        # (sentence, unit) -> how many rows it holds for, the last, and the first few of them
        self.notes: dict[tuple[str, str], list[int]] = {}

    def problem(self, row: int, field: str, message: str) -> None:
        self.count += 1
        if self.count <= KEPT:
            self.problems.append((row, field[:40], message))

    def stop(self, message: str, row: int = 0, field: str = "") -> NoReturn:
        """Raise DatasetError now: this problem, then those found before."""
        problems = [(row, field, message), *self.problems][:KEPT]
        raise DatasetError(self.path, problems, self.count + 1)

    def unused(self, name: str, number: int) -> None:
        """Note that the field `name` of row `number` is left out."""
        sentence = f"字段 {name[:40] or '（没有名字）'} 课程用不到，没有读入"
        if (sentence, "条") not in self.notes and len(self.notes) >= NAMES:
            sentence = "还有很多别的字段课程也用不到，没有读入"
        self.note(sentence, number)

    def note(self, sentence: str, number: int = 0, unit: str = "条") -> None:
        """Remember `sentence`, and that it holds for row (or line) `number`."""
        seen = self.notes.setdefault((sentence, unit), [0, 0])
        if number != seen[1]:
            seen[0], seen[1] = seen[0] + 1, number
            if len(seen) < 2 + NAMED:
                seen.append(number)

    def report(self) -> list[str]:
        said = []
        for (sentence, unit), (count, _, *first) in self.notes.items():
            named = "、".join(map(str, first)) + (f" 等 {count}" if count > NAMED else "")
            said.append(_shown(f"{sentence}：第 {named} {unit}。" if count else f"{sentence}。"))
        return said


def load_rows(path: str | Path) -> pd.DataFrame:
    """Read and check a dataset: a JSON array, JSON Lines or CSV, told apart by content.

    Returns one dialogue a row, text columns ``instruction``, ``input``, ``output``, every text as
    written, a missing ``input`` as "". The index is the row number in the file, from 1; a dialogue
    of several turns becomes several rows with the same number. ``attrs["report"]`` lists, in
    Chinese, all that was recognised, converted, left out or noticed. Raises DatasetError with
    every problem found.
    """
    log = _Log(Path(path))
    # Bytes and text get no name here, so that they are freed as soon as they are used up.
    columns, numbers = _collect(_rows(_decode(_read(log), log), log), log)
    if log.count:
        raise DatasetError(log.path, log.problems, log.count)
    if not numbers:
        log.stop(f"里面一条对话也没有，请至少写两条：[{EXAMPLE}, {EXAMPLE}]。")
    first = columns[0][0].strip()
    if all(text.strip() == first for text in columns[0]):
        log.stop("只有一个不同的问题，留不出验证集，请至少写两个不同的问题。", field="instruction")
    # Not DataFrame.duplicated(): it takes more memory than the whole table.
    hashes = np.fromiter(map(hash, zip(*columns, strict=True)), np.int64, len(numbers))
    for number in np.delete(numbers, np.unique(hashes, return_index=True)[1]).tolist():
        log.note("与前面某一条完全相同，照样留着", number)
    content = dict(zip(FIELDS, columns, strict=True))
    table = pd.DataFrame(content, index=np.array(numbers), dtype=object)
    table.attrs["report"] = log.report()
    return table


def _read(log: _Log) -> bytes:
    """The bytes of the file, which must be an ordinary one that nobody is writing to."""
    path = log.path
    try:
        before = path.stat()
        if stat.S_ISDIR(before.st_mode):
            log.stop("这是一个文件夹，请写出里面那个数据文件的名字。")
        if not stat.S_ISREG(before.st_mode):  # reading a pipe could wait for ever
            log.stop("这不是普通文件（是管道或设备），请先把数据存成文件。")
        raw = path.read_bytes()
        after = path.stat()
    except FileNotFoundError:
        log.stop(f"文件打不开（找不到 {path}），请检查文件名和所在的文件夹。")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        log.stop(f"文件打不开（{reason}），请检查路径，以及你有没有读它的权限。")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        log.stop("文件在读的时候变了，可能还在上传或保存，请等它写完，再运行一次。")
    return raw


def _decode(raw: bytes, log: _Log) -> str:
    """The text of the file, whatever common encoding it is in."""
    for starts, what, remedy in MAGIC:
        if raw.startswith(starts):
            log.stop(f"这看起来是{what}，不是文字。{remedy}")
    bom = next((mark for mark in BOMS if raw.startswith(mark)), b"")
    encoding = BOMS[bom] if bom else _without_mark(raw)
    if encoding is None:
        log.stop(f"这看起来是二进制文件，不是文字。{TO_CSV}")
    if bom:
        log.note("文件开头有 BOM（看不见的编码标记），已跳过")
    try:
        text = str(memoryview(raw)[len(bom) :], encoding)
    except UnicodeDecodeError as error:
        text = None if bom or encoding != "utf-8" else _chinese(raw, error.start)
        if text is None:
            line = raw.count(b"\n", 0, len(bom) + error.start) + 1
            log.stop(
                f"文件第 {line} 行有字节按 {encoding.upper()} 解不开，也不像 GBK：可能损坏了，或是"
                "别的编码（如 Big5）。请重新下载，或在编辑器里核对原文，另存为 UTF-8。"
            )
        encoding = "gb18030（GBK）"
    if encoding != "utf-8":
        log.note(f"文件不是 UTF-8，是 {encoding.upper()} 编码，已按这种编码读入")
    return text


def _without_mark(raw: bytes) -> str | None:
    """The encoding to try where no BOM tells it, None for a binary file.

    UTF-16 shows in its NULs: they are the upper halves of ASCII characters.
    """
    head = raw[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) * 10 > len(head) and max(even, odd) > 4 * min(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    controls = len(head) - len(head.translate(None, bytes({*range(32)} - {*b"\t\n\f\r"})))
    return None if controls * 10 > len(head) else "utf-8"


def _chinese(raw: bytes, bad: int) -> str | None:
    """The text as GB18030 if that is likely, else None. UTF-8 gave up at offset `bad`.

    GB18030 makes some character of almost any two bytes, so two doubts come first: is this UTF-8
    with a few broken bytes, and are the characters it makes everyday ones (those of GB2312)?
    """
    near = raw[max(0, bad - 10_000) : bad + 10_000].decode("utf-8", "replace")
    broken = near.count("\ufffd")
    if sum(char > "\x7f" for char in near) > 2 * broken:
        return None
    made = [c for c in raw[bad : bad + 10_000].decode("gb18030", "ignore") if c > "\x7f"]
    if len("".join(made).encode("gb2312", "ignore")) <= len(made):  # two bytes each: half of them
        return None
    try:
        return raw.decode("gb18030")
    except UnicodeDecodeError:
        return None


def _rows(text: str, log: _Log) -> Iterator[tuple[int, Any]]:
    """(number, value) of every row, whatever the format."""
    if not re.search(r"\S", text):
        log.stop("文件是空的，请先写入对话。")
    suffix = log.path.suffix.lower().removeprefix(".")
    start = text[_blank(text).end()]
    if start in "[{":
        kind = "jsonl" if start == "{" and _is_jsonl(text) else "json"
    else:
        kind = "csv" if suffix == "csv" or _header(text)[1] > 1 else "json"
    if kind != suffix:
        log.note(f"文件名的后缀是 {suffix or '（没有）'}，内容是 {FORMATS[kind]}，已按内容读入")
    yield from {"json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows}[kind](text, log)


class _Number(str):
    """A number as a JSON file writes it: int refuses thousands of digits, float rounds."""


def _object(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):  # keys of JSON are texts, so None is free to hold the repeated ones
        row[None] = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return row


_JSON = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_Number, parse_float=_Number, parse_constant=_Number
)


def _value(text: str, place: int) -> tuple[Any, int]:
    """The JSON value at `place` or after blanks, and where the next thing begins."""
    place = _blank(text, place).end()
    try:
        value, end = _JSON.raw_decode(text, place)
    except RecursionError:
        raise json.JSONDecodeError("Nested", text, place) from None
    return value, _blank(text, end).end()


def _syntax(error: json.JSONDecodeError, line: int = 0) -> str:
    """Where the JSON is broken and how to mend it. `line` where `error` knows one line only."""
    text, place = error.doc, error.pos
    before, here = text[max(0, place - 60) : place].rstrip(), text[place : place + 40]
    says = error.msg
    if _blank(text, place).end() == len(text) and not says.startswith("Unterminated"):
        says = "End"
    remedy = next(
        remedy
        for begins, behind, at, remedy in REMEDIES
        if says.startswith(begins) and re.match(at, here) and re.search(behind, before)
    )
    near = " ".join((before[-12:] + here[:12]).split())
    where = f"文件第 {line or error.lineno} 行第 {error.colno} 个字符（{near}）附近"
    return f"{where}不合 JSON 的写法：{remedy}"


def _json_rows(text: str, log: _Log) -> Iterator[tuple[int, Any]]:
    number, place = 1, _blank(text).end()
    if text[place] != "[":
        _not_an_array(text, log)
    place = _blank(text, place + 1).end()
    try:
        while text[place : place + 1] != "]":
            value, place = _value(text, place)
            yield number, value
            mark, after = text[place : place + 1], _blank(text, place + 1).end()
            if mark == "]":
                break
            if mark != "," or text[after : after + 1] == "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            number, place = number + 1, after
    except json.JSONDecodeError as error:
        log.stop(_syntax(error), number)
    place = _blank(text, place + 1).end()
    if place < len(text):
        log.stop(_syntax(json.JSONDecodeError("After", text, place)))


def _not_an_array(text: str, log: _Log) -> NoReturn:
    """Say what to do about a JSON file whose outermost value is not an array."""
    wrap = "请在每两条之间加英文逗号，最外面用 [ ] 括起来，成为一个数组。"
    try:
        value, end = _value(text, 0)
        if end < len(text) and not (type(value) is dict and text[end] in ",{"):
            raise json.JSONDecodeError("After", text, end)
    except json.JSONDecodeError as error:
        log.stop(_syntax(error))
    if end < len(text):
        log.stop(f"最外层有好几个对象，一个接一个。{wrap}")
    if type(value) is not dict:
        log.stop(f"最外层是{_what(value)[0]}，应当是一个数组。{wrap}")
    if not value:
        log.stop(f"最外层是空的 {{ }}，应当是一个数组：[{EXAMPLE}, {EXAMPLE}]。")
    if any(type(value.get(name)) in (dict, list) for name in FIELDS):
        export = 'to_json(…, orient="records", force_ascii=False)'
        log.stop(f"内容是按列写的，应当是一条一条的数组：用 pandas 导出时请写 {export}。")
    for key, rows in value.items():
        if type(rows) is list and rows and type(rows[0]) is dict and (key,) not in SHAPES:
            log.stop(f"最外层是对象，对话在“{key[:40]}”里：请只留下它后面的数组 [ … ]。")
    log.stop(f"最外层是单独一个对象，应当是数组，里面至少两条对话。{wrap}")


def _is_jsonl(text: str) -> bool:
    """Whether more follows a first line that is one whole value, or a broken one."""
    line = _LINE.match(text, _blank(text).end())
    start = _blank(text, line.end()).end()
    more = text[start : start + 1]
    try:
        _, end = _value(line[0], 0)
    except json.JSONDecodeError:
        return more == "{" and line[0].rstrip()[-1] not in "[{,:"
    return more != "" and line[0][end:].strip() in ("", ",")


def _jsonl_rows(text: str, log: _Log) -> Iterator[tuple[int, Any]]:
    number = 0
    for line_number, match in enumerate(_LINE.finditer(text), 1):
        line = match[0]
        if not line.strip():
            log.note("有空行，已跳过", line_number, "行")
            continue
        number += 1
        try:
            value, end = _value(line, 0)
            if end < len(line):
                raise json.JSONDecodeError("After", line, end)
            yield number, value
        except json.JSONDecodeError as error:
            log.problem(number, "", _syntax(error, line_number))


def _csv_rows(text: str, log: _Log) -> Iterator[tuple[int, Any]]:
    delimiter, _ = _header(text)
    if delimiter != ",":
        name = {";": "分号", "\t": "制表符（Tab）"}[delimiter]
        log.note(f"格子之间用的是{name}，不是逗号，已按它分开")
    csv.field_size_limit(2**31 - 1)  # Python refuses cells beyond 128 KiB; ours are only reported
    lines = (match[0] for match in _LINE.finditer(text))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number, line, header = 0, 1, []
    how = '有逗号、换行或引号的格子，整格用一对英文双引号 " 括起来，里面的引号写成两个 ""。'
    try:
        for cells in reader:
            if not "".join(cells).strip():
                log.note("有空行，已跳过", line, "行")
            elif not header:
                header = _columns(cells, log)
            else:
                number += 1
                where = f"文件第 {line} 行"
                if len(cells) != len(header):
                    counts = f"{where}有 {len(cells)} 格，列名却有 {len(header)} 个"
                    log.problem(number, "", f"{counts}：{how}空着的格也要留逗号。")
                elif any(cell.startswith(' "') for cell in cells):
                    log.problem(number, "", f"{where}的引号前面有空格，请删掉空格。")
                else:
                    yield number, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        what = "引号没有配对"
        if "unexpected end" in str(error):
            what = "有一个引号直到文件末尾也没有结束"
        elif "NUL" in str(error):  # Python 3.10; later ones pass it on, and the row is refused
            what = "有控制字符 U+0000（NUL），请删掉"
        log.stop(f"文件第 {line} 行起{what}：{how}", number + bool(header))


def _header(text: str) -> tuple[str, int]:
    """The likeliest delimiter of a CSV file, and how many column names we know it gives."""
    start = _blank(text).end()
    line = text[start : start + 1000].replace("\0", "").splitlines()[0]  # 3.10's csv refuses NUL
    scores = {}
    for delimiter in ",;\t":
        cells = next(csv.reader([line], delimiter=delimiter))
        scores[delimiter] = sum(cell.strip().lower() in KNOWN for cell in cells)
    return max(scores.items(), key=lambda pair: pair[1])


def _columns(cells: list[str], log: _Log) -> list[str]:
    """The column names of a CSV file, checked, so that no row has to repeat their faults."""
    header = [cell.strip() for cell in cells]
    for name, count in Counter(header).items():
        if name and count > 1:
            log.problem(0, name, f"这一列出现了 {count} 次，请只留一列。")
    _, missing, _ = _plan(tuple(header))
    if len(missing) == 2 and not any("→" in message for _, message in missing):
        log.stop("第一行应当是用英文逗号隔开的列名：instruction,input,output。请补上。")
    for name, message in missing:
        log.problem(0, name, message)
    if log.count:
        raise DatasetError(log.path, log.problems, log.count)
    return header


def _collect(rows: Iterator[tuple[int, Any]], log: _Log) -> tuple[tuple[list[str], ...], array]:
    """The three columns and the row numbers. With the first problem they stop growing."""
    columns, numbers = ([], [], []), array("q")
    for number, row in rows:
        for texts in _texts(row, number, log):
            if log.count:
                continue
            numbers.append(number)
            for name, column, text in zip(FIELDS, columns, texts, strict=True):
                column.append(text)
                if len(text) > LONG:
                    log.note(f"{name} 超过 {LONG} 个字，notebook 02 会截短或放在一边", number)
    return columns, numbers


def _texts(row: Any, number: int, log: _Log) -> list[tuple[str, str, str]]:
    """Check one row: its (instruction, input, output), or several of a longer dialogue."""
    if type(row) is not dict:
        log.problem(number, "", f"这一条应当是 {EXAMPLE}，这里却是{_what(row)[0]}。")
        return []
    for key in row.pop(None, ()):
        log.problem(number, key, "这个字段写了不止一次，请只留一个。")
    names, missing, extra = _plan(tuple(row))
    for name in extra:
        log.unused(name, number)
    for name, message in missing:
        log.problem(number, name, message)
    if len(names) == 1:
        return _dialogue(row[names[0]], number, names[0], log)
    if names is not FIELDS:
        log.note(f"字段 {names[0]}、{names[2]} 换成了 instruction、output", number)
    faults = [(name, fault) for name in names if name in row and (fault := _fault(row[name]))]
    for name, fault in faults:
        log.problem(number, name, fault)
    if faults or missing:
        return []
    ask, given, answer = row[names[0]], row.get(names[1], ""), row[names[2]]
    if not ask.strip() and not given.strip():
        log.problem(number, names[0], "是空的，请写上对她说的话。")
    if not answer.strip():
        log.problem(number, names[2], "是空的，请写上她的回答。")
    return [(ask, given, answer)]


@lru_cache(maxsize=KEPT)  # nearly all rows of a file have the same keys
def _plan(keys: tuple[str, ...]) -> tuple[tuple[str, ...], list[tuple[str, str]], list[str]]:
    """For a row with these keys: the fields to read, (field, message) of the missing, the rest."""
    names = FIELDS
    if "instruction" not in keys and "output" not in keys:
        names = next((shape for shape in SHAPES if {*shape} <= {*keys, "input"}), FIELDS)
    others = {key.strip().lower(): key[:40] for key in keys if key not in names}
    missing = []
    for name in names:
        if name not in keys:
            like = [key for key in others if key in MEANT[name]]
            like = like or difflib.get_close_matches(name, others, 1, 0.75)
            if like:
                meant = f"{others[like[0]]} → {name}"
                missing.append((name, f"缺少这个字段，是名字写得不一样吗？{meant}？请改名。"))
            elif name != "input":
                missing.append((name, "缺少这个字段，请补上。"))
    return names, missing, [key for key in keys if key not in names]


def _fault(value: Any) -> str:
    """Why `value` cannot be a text of a dialogue, "" if it can: no text, or broken characters."""
    if type(value) is not str:
        return "应当是一段文字，这里却是{}，{}".format(*_what(value))
    bad = _BAD.search(value)
    if not bad:
        return ""
    what = "看不见的控制字符 {}，请删掉"
    if bad[0] == "\ufffd":
        what = "乱码 {}，原来的字已经丢了，请对照原文改正"
    elif bad[0] >= "\ud800":
        what = "半个字符 {}（多半是表情符号断开了），请重新输入"
    return f"第 {bad.start() + 1} 个字符是{what.format(f'U+{ord(bad[0]):04X}')}。"


def _what(value: Any) -> tuple[str, str]:
    """What a JSON value is, and what to write in its place."""
    if value is None:
        return " null（空）", NOTHING
    if type(value) is _Number and value.strip("-") in ("NaN", "Infinity"):
        return f" {value}（空格子，或算不出的数）", NOTHING
    if type(value) in (_Number, bool):
        written = value[:40] if type(value) is _Number else str(value).lower()
        return f" {written}", f'请加上引号，写成 "{written}"，或换成文字。'
    if type(value) is list:
        return "一个数组 [ ]", "请合成一段文字，换行写作 \\n。"
    return ("一个对象 { }" if type(value) is dict else "一段文字"), "请去掉花括号，只留一段文字。"


def _dialogue(turns: Any, number: int, field: str, log: _Log) -> list[tuple[str, str, str]]:
    """The question-answer pairs of a dialogue in turns; only its first fault is reported."""
    fault, spoken = "", []
    if type(turns) is not list:
        fault = f"应当是一个数组，一问一答轮流写，这里却是{_what(turns)[0]}。"
    for place, turn in enumerate([] if fault else turns, 1):
        if fault := _turn(turn, number, field, spoken, log):
            fault = f"第 {place} 句{fault}"
            break
    if not fault and (not spoken or len(spoken) % 2):
        fault = "最后一句应当是 assistant 的回答：请补上回答，或删掉没有回答的那句。"
    if fault:
        log.problem(number, field, fault)
        return []
    log.note(f"{field} 里的一问一答换成了 instruction、output", number)
    if len(spoken) > 2:
        log.note("多轮对话拆成了几条，每条只有一问一答，前面说过的不带过来", number)
    return [(ask, "", answer) for ask, answer in zip(spoken[::2], spoken[1::2], strict=True)]


def _turn(turn: Any, number: int, field: str, spoken: list[str], log: _Log) -> str:
    """Add what one turn says to `spoken`, or return what is wrong with it."""
    expected = ("user", "assistant")[len(spoken) % 2]
    if type(turn) is not dict:
        return f'应当是 {{"role": "{expected}", "content": "…"}}，这里却是{_what(turn)[0]}。'
    if repeated := turn.pop(None, None):
        return f"的字段 {repeated[0][:40]} 写了不止一次，请只留一个。"
    for name in turn.keys() - {"role", "content", "from", "value"}:
        log.unused(f"{field}.{name}", number)
    name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(name) if type(name) is str else None
    if role == "system":
        log.note("system 的话没有读入，课程有自己的系统提示", number)
        return ""
    if role is None:
        said = name[:40] if type(name) is str else _what(name)[0]
        return f"的角色不认识：{said}。请改成其中之一：{'、'.join(ROLES)}。"
    if role != expected:
        return f"是 {name} 说的，这里应当轮到 {expected}：请补上缺的那句，或把相连的两句并成一句。"
    if fault := _fault(content):
        return f"的内容{fault}"
    if not content.strip():
        return f"是空的，请写上 {name} 说的话。"
    spoken.append(content)
    return ""


def normalised(instruction: str) -> str:
    """`instruction` as it is compared: without punctuation, spaces, and differences of width and case."""
    folded = unicodedata.normalize("NFKC", instruction).casefold()
    return re.sub(r"[\W_]+", "", folded) or instruction.strip()


def asks_identity(rows: pd.DataFrame) -> pd.Series:
    """Which rows (bools) ask who she is: a short question whose answer gives her name."""
    named = rows["output"].map(lambda answer: all(character in answer for character in NAME))
    longest = rows["instruction"].map(lambda asked: 45 if asked.isascii() else 15)  # characters
    return named & (rows["instruction"].str.len() <= longest) & (rows["input"] == "")


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
