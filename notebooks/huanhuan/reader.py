"""Room 02's cellar: any dataset file into rows, or a message that helps."""

import codecs
import csv
import json
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from charset_normalizer import from_bytes

from huanhuan import CourseError, shapes
from huanhuan.shapes import EXAMPLE, FIELDS, KNOWN, LINES, NAMED, NOTHING, UNFIT, shape, short

SHOWN, KEPT = 20, 1000  # problems listed in a message; held in memory, however bad the file is
NAMES = 100  # unused fields, or placeholders, named in the report
LONG, FEW = 2000, 10  # characters of a field, rows of a file, of which the report speaks
TURNS = 100  # turns of history a row holds at most: endless dialogues stay linear
FORMATS = {"json": "JSON", "jsonl": "JSON Lines", "csv": "CSV 表格"}
BOMS = {  # UTF-32 first: its mark begins like that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
TO_CSV = "请用原来的程序打开，另存为“CSV UTF-8（逗号分隔）”或导出成 JSON，再选那个文件。"
MAGIC = (  # how files that are no text begin
    ((b"PK\x03\x04",), "Excel 表格（.xlsx）或 zip 压缩包", TO_CSV + "压缩包请先解压。"),
    ((b"\xd0\xcf\x11\xe0",), "旧版 Excel 或 Word 文件", TO_CSV),
    ((b"{\\rtf", b"%PDF"), "排版文档（RTF 或 PDF）", "请把对话抄进表格，另存为 CSV，或存成 JSON。"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "图片", "请另找 JSON 或 CSV 格式的数据。"),
    ((b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf"), "压缩包", "请先解压，再选里面的 JSON 或 CSV 文件。"),
    ((b"PAR1", b"SQLite"), "数据库或 Parquet 表格", "请导出成 CSV 或 JSON，再选那个文件。"),
)  # fmt: skip
_blank = re.compile(r"[ \t\r\n]*").match  # what JSON calls white space, nothing else
_JSONISH = re.compile(
    r"^\s*(?:[{｛]|[\[【［]\s*(?:[\[{｛\"'“‘\]/#.]|-?\d+\s*[,\]]|[ntfNTF]\w+|\Z))", re.M
)
# Where JSON breaks off: what the parser says (beginning), what stands before, what stands there
# (patterns), and the remedy. The first that fits is given.
REMEDIES = (
    ("Nested", "", "", f"括号套得太深了，一条对话应当是 {EXAMPLE}。"),
    ("Unterminated", "", "", '这段文字没有结束的引号 "：请补上；后面本来还有内容的，是文件不完整，请重新下载或导出。'),
    ("End", "", "", "写到这里就断了：文件不完整，请重新下载或导出；自己写的，请补上缺的括号。"),
    ("Invalid control", "", "", '文字里不能直接换行或写制表符（Tab），请写成 \\n、\\t；别的看不见的控制字符请删掉；文字到此为止的，请补上引号 "。'),
    ("Invalid \\", "", "", "反斜杠 \\ 后面只能跟 n、t、u 等几种写法；要写反斜杠本身，请写成 \\\\。"),
    ("After", r"\]$", r"\[", "这里又开始了一个数组：请把几个数组并成一个，只留一对 [ ]，各条之间用英文逗号。"),
    ("After", r"\}$", ",", "每行一个对象的文件，行尾不要逗号，请删掉；或在最外面加上 [ ]，成为一个数组。"),
    ("After", r"\}$", r"\{", "一个对象后面又来了一个：请在每两条之间加英文逗号，最外面用 [ ] 括起来；每行一个对象的，请换行。"),
    ("", "", r"//|/\*|#", "JSON 里不能写注释，请删掉。"),
    ("After", "", "", "内容到这里已经结束，请删掉后面多出来的东西。"),
    ("", ",$", r"[\]},]", "多了一个逗号：最后一项后面没有逗号，请删掉。"),
    ("", "", r",\s*[\]}]", "多了一个逗号：最后一项后面没有逗号，请删掉。"),
    ("", "", "['“”‘’＂「」『』]", '这里用了单引号，或者引号是全角的，请改成英文双引号 "。'),
    ("Expecting ','", r"[”’＂]\s*[,，:：}].*$", "", '前面那段文字结尾的引号是全角的，请改成英文双引号 "。'),
    ("", "", "[，、；;：=]", "这里的标点应当是英文逗号 , 或英文冒号 : （全角的、顿号、分号、等号都不行）。"),
    ("", "", "[【】［］｛｝()（）]", "这里的括号应当是英文的 [ ] 或 { }。"),
    ("", "", r"(None|True|False|nan|NAN|inf|undefined|NULL)\b", f"None、True、nan 是别的语言（如 Python）的写法，JSON 里没有：{NOTHING}"),
    ("", "", r"…|\.\.", "省略号不是 JSON，请删掉，或写出全部对话。"),
    ("", "", r"\0", "这里是空字节（NUL）：文件多半没有下载完整，请重新下载或导出。"),
    ("Expecting ','", "", r'["{\[]', "前面少了一个英文逗号 , ，请补上。"),
    ("Expecting ','", "", r"[\]}]", "括号没有配对：{ 要用 } 结束，[ 要用 ] 结束。"),
    ("Expecting ','", "", "", '前面那段文字里多半有英文双引号，请写成 \\" 或改用“”；也可能少了逗号。'),
    ("Expecting ':'", "", "", "字段名和内容之间少了英文冒号 : ，请补上。"),
    ("Expecting prop", "", "", '这里应当是带英文双引号的字段名，如 "output"；前一条要先用 } 结束。'),
    ("", "", "", f"JSON 文件应当是 [{EXAMPLE}, …]，请检查这里的逗号、引号和括号。"),
)  # fmt: skip


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
        # It quotes the file: nothing that a terminal could not print.
        super().__init__(UNFIT.sub("\ufffd", f"数据集 {path.name} 用不了，什么都没有写入。{body}"))


class Log:
    """What is found while a file is read: problems, and notes for the report."""

    def __init__(self, path: Path):
        self.path, self.problems, self.count = path, [], 0
        # (sentence, unit) -> how many rows it holds for, the last, and the first few of them
        self.notes: dict[tuple[str, str], list[int]] = {}
        self.unit = "条"  # what is counted: rows, or lines of a text
        self.placeholders: dict[str, str] = {}  # each one's sentence

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
        sentence = f"字段 {short(name)} 课程用不到，没有读入"
        if (sentence, self.unit) not in self.notes and len(self.notes) >= NAMES:
            sentence = "还有很多别的字段课程也用不到，没有读入"
        self.note(sentence, number)

    def placeholder(self, mark: str, number: int) -> None:
        if mark in self.placeholders or len(self.placeholders) < NAMES:
            sentence = f"占位符 {mark} 还没有换成真的内容，照这样训练，她会原样说出来"
            self.placeholders[mark] = sentence
            self.note(sentence, number)

    def note(self, sentence: str, number: int = 0, unit: str = "") -> None:
        """Remember `sentence`, and that it holds for row (or line) `number`."""
        seen = self.notes.setdefault((sentence, unit or self.unit), [0, 0])
        if number != seen[1]:
            seen[0], seen[1] = seen[0] + 1, number
            if len(seen) < 2 + NAMED:
                seen.append(number)

    def report(self) -> list[str]:
        said = []
        for (sentence, unit), (count, _, *first) in self.notes.items():
            named = "、".join(map(str, first)) + (f" 等 {count}" if count > NAMED else "")
            said.append(UNFIT.sub("\ufffd", sentence + f"：第 {named} {unit}" * bool(count) + "。"))
        return said


def load_rows(path: str | Path) -> pd.DataFrame:
    """Read and check a dataset: JSON, JSON Lines, CSV or a script, told apart by content.

    Returns one answer a row: ``instruction``, ``input``, ``output``, every text as written, a
    missing ``input`` as "", and ``history``, what was said before as a list of [question, answer],
    oldest first. The index is the row number in the file, from 1, the same for all answers of a
    dialogue; in a script or a chat export it is that of the answer. ``attrs["report"]`` lists, in
    Chinese, all that was recognised, converted, left out or noticed; ``attrs["placeholders"]`` how
    many rows hold each of them. Raises DatasetError with every problem found.
    """
    log = Log(Path(path))
    # Bytes and text get no name here, so that they are freed as soon as they are used up.
    columns, numbers, extra = _collect(_dialogues(_decode(_read(log), log), log), log)
    if log.count:
        raise DatasetError(log.path, log.problems, log.count)
    read = "读的时候：" * bool(log.notes) + "".join(log.report()[:5])
    if not numbers:
        log.stop(f"里面一条对话也没有，请至少写两条：[{EXAMPLE}, {EXAMPLE}]。{read}")
    first = columns[0][0].strip()
    if all(text.strip() == first for text in columns[0]):
        one = f"只有一个不同的问题，留不出验证集，请至少写两个不同的问题。{read}"
        log.stop(one, field="instruction")
    # Not DataFrame.duplicated(): it takes more memory than the whole table.
    keys = ((*texts, *map(tuple, turns)) for *texts, turns in zip(*columns, strict=True))
    hashes = np.fromiter(map(hash, keys), np.int64, len(numbers))
    index, extra = np.array(numbers), np.frombuffer(extra, bool)
    new = np.zeros(len(index), bool)
    new[np.unique(hashes, return_index=True)[1]] = True
    # An answer out of a `history` counts only where the file has it nowhere else.
    kept = ~extra | (new & ~np.isin(hashes, hashes[~extra]))
    for number in index[~kept].tolist():
        log.note("history 里的回答在文件里另有一条，没有重复读入", number)
    for number in index[kept & ~extra & ~new].tolist():
        log.note("与前面某一条完全相同，照样留着", number)
    if kept.sum() < FEW:
        log.note(f"只有 {kept.sum()} 条，教不会她什么，请尽量写到几十条以上")
    table = pd.DataFrame(dict(zip((*FIELDS, "history"), columns, strict=True)), index, dtype=object)
    table = table if kept.all() else table[kept]
    counts = {mark: log.notes[said, log.unit][0] for mark, said in log.placeholders.items()}
    table.attrs |= {"report": log.report(), "placeholders": counts}
    return table


def fill_placeholders(rows: pd.DataFrame, values: dict[str, str]) -> pd.DataFrame:
    """`rows` with each placeholder of `values`, such as ``{"{{name}}": NAME}``, replaced everywhere."""
    marks = re.compile("|".join(map(re.escape, values)) or r"(?!)")
    done, left, report = rows.copy(), rows.attrs["placeholders"].copy(), rows.attrs["report"]
    for name in FIELDS:
        done[name] = [marks.sub(lambda mark: values[mark[0]], text) for text in rows[name]]
    done["history"] = [
        [[marks.sub(lambda mark: values[mark[0]], text) for text in turn] for turn in turns]
        for turns in rows["history"]
    ]
    for mark in [mark for mark in values if mark in left]:
        report = [said for said in report if not said.startswith(f"占位符 {mark} ")]
        report.append(f"{left.pop(mark)} 条里的 {mark} 换成了“{values[mark]}”。")
    done.attrs |= {"report": report, "placeholders": left}
    return done


def _read(log: Log) -> bytes:
    """The bytes of the file, which must be an ordinary one that nobody is writing to."""
    path = log.path
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):  # reading a pipe could wait for ever
            log.stop("这不是普通文件，是文件夹、管道或设备：请写出数据文件本身的名字。")
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


def _decode(raw: bytes, log: Log) -> str:
    """The text of the file, whatever common encoding it is in."""
    for starts, what, remedy in MAGIC:
        if raw.startswith(starts):
            log.stop(f"这看起来是{what}，不是文字。{remedy}")
    bom = next((mark for mark in BOMS if raw.startswith(mark)), b"")
    head = raw[:4096]
    controls = len(head) - len(head.translate(None, bytes({*range(32)} - {*b"\t\n\f\r"})))
    # Many NULs are those of UTF-16 without its mark, or of no text.
    encoding = BOMS.get(bom) or ("utf-8" if controls * 10 <= len(head) else _guessed(head))
    if not encoding:
        log.stop(f"这看起来是二进制文件，不是文字。{TO_CSV}")
    try:
        text = str(memoryview(raw)[len(bom) :], encoding)
    except UnicodeDecodeError as error:
        start = error.start // 2 * 2  # between two characters of UTF-16
        guess = _guessed(raw[max(0, start - 4096) : start + 8192])
        if encoding != "utf-8" or bom or "end of data" in error.reason or not guess:
            line = raw.count(b"\n", 0, len(bom) + error.start) + 1
            log.stop(
                f"文件第 {line} 行有字节按 {encoding.upper()} 解不开，也不像 GBK 或 Big5：可能损坏了，"
                "或是别的编码。请重新下载，或在编辑器里核对原文，另存为 UTF-8。"
            )
        encoding, text = guess, raw.decode(guess, "replace")  # what it replaces is refused later
    if bom:
        log.note("文件开头有 BOM（看不见的编码标记），已跳过")
    if encoding != "utf-8":
        name = encoding.upper().replace("GB18030", "GB18030（GBK）")
        log.note(f"文件不是 UTF-8，是 {name} 编码，已按这种编码读入")
    return text


def _guessed(raw: bytes) -> str:
    """The encoding that makes everyday Chinese of these bytes, "" for broken or binary ones."""
    likely = ["gb18030", "big5", "utf_16_le", "utf_16_be"]
    best = from_bytes(raw, cp_isolation=likely, enable_fallback=False).best()
    return best.encoding.replace("_", "-") if best else ""


def _dialogues(text: str, log: Log) -> Iterator[list[tuple]]:
    """The turns of every dialogue, whatever the format: (number, question, input, answer, own)."""
    if not re.search(r"\S", text):
        log.stop("文件是空的，请先写入对话。")
    suffix = log.path.suffix.lower().removeprefix(".").replace("tsv", "csv")
    first = LINES.match(text, _blank(text).end())
    more = text[(after := _blank(text, first.end()).end()) : after + 1]
    known = _header(first[0])[1]
    if _JSONISH.match(text):
        alone = suffix == "jsonl" and first[0][0] == "{" and not more
        kind = "jsonl" if alone or _is_jsonl(first[0], more) else "json"
    elif known > 1 or (suffix == "csv" and (known or re.search("[,;\t，]", first[0]))):
        kind = "csv"
    elif "```" not in text[:2000] and _JSONISH.search(text[:2000]):  # broken in its first line
        kind = "jsonl" if suffix == "jsonl" else "json"
    else:  # a number and the like are JSON, too
        kind = "json" if re.fullmatch(r'\s*(\d+|null|true|false|"[^"]*")\s*', text) else "txt"
    if kind == "txt":
        lines = shapes.messages(shapes.script(text, log), shape(("role", "content")), log)
        return (yield from shapes.conversations(lines, log))
    if kind != suffix:
        log.note(f"文件名的后缀是 {suffix or '（没有）'}，内容是 {FORMATS[kind]}，已按内容读入")
    rows = {"json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows}[kind](text, log)
    head = next(rows, (0, None))
    names = tuple(head[1]) if type(head[1]) in (dict, list) else ()
    plan = shape(names) if names and all(type(name) is str for name in names) else None
    rows = chain([head] * bool(head[0]), rows)
    if plan and type(head[1]) is dict and plan.missing and plan.said and (plan.who or plan.her):
        return (yield from shapes.conversations(shapes.messages(rows, plan, log), log))
    if plan and type(head[1]) is list and not plan.missing:  # a table, written as arrays of cells
        rows = ((n, dict(zip(names, row)) if type(row) is list else row) for n, row in rows)  # noqa: B905
        next(rows)
    for number, row in rows:
        for one in shapes.expanded(row, number, log):
            yield shapes.turns_of(one, number, log)


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
    text, place, says = error.doc, error.pos, error.msg
    before, here = text[max(0, place - 60) : place].rstrip(), text[place : place + 40]
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


def _json_rows(text: str, log: Log) -> Iterator[tuple[int, Any]]:
    number, place = 0, _blank(text).end()
    try:
        if text[place] != "[":
            value, place = _value(text, place)
            if place < len(text):
                raise json.JSONDecodeError("After", text, place)
            return (yield from enumerate(shapes.unwrapped(value, log), 1))
        place = _blank(text, place + 1).end()
        while text[place : place + 1] != "]":
            number += 1
            value, place = _value(text, place)
            yield number, value
            mark, after = text[place : place + 1], _blank(text, place + 1).end()
            if mark == "]":
                break
            if mark != "," or text[after : after + 1] == "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = after
    except json.JSONDecodeError as error:
        log.stop(_syntax(error), number)
    place = _blank(text, place + 1).end()
    if place < len(text):
        log.stop(_syntax(json.JSONDecodeError("After", text, place)))


def _is_jsonl(line: str, more: str) -> bool:
    """Whether `more` follows a first line that is one whole value, or a broken one."""
    try:
        value, end = _value(line, 0)
    except json.JSONDecodeError:
        return line[0] == more == "{" and line.rstrip()[-1] not in "[{,:"
    whole = line[end:].strip() in ("", ",")
    return whole and (more == "[" if type(value) is list else more != "")


def _jsonl_rows(text: str, log: Log) -> Iterator[tuple[int, Any]]:
    number = 0
    for line_number, match in enumerate(LINES.finditer(text), 1):
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


def _header(line: str) -> tuple[str, int]:
    """The likeliest delimiter of a CSV file, and how many column names we know it gives."""
    cells = {mark: line.strip().replace('"', "").split(mark) for mark in ",;\t"}
    known = {mark: sum(c.strip().lower() in KNOWN for c in cells[mark]) for mark in cells}
    best = max(cells, key=lambda mark: (known[mark], len(cells[mark])))
    return best, known[best]


def _csv_rows(text: str, log: Log) -> Iterator[tuple[int, Any]]:
    delimiter, _ = _header(LINES.match(text, _blank(text).end())[0])
    if delimiter != ",":
        name = "分号" if delimiter == ";" else "制表符（Tab）"
        log.note(f"格子之间用的是{name}，不是逗号，已按它分开")
    csv.field_size_limit(2**31 - 1)  # Python refuses cells beyond 128 KiB; ours are only reported
    lines = (match[0] for match in LINES.finditer(text))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number, line, header = 0, 1, []
    how = '有逗号、换行或引号的格子，整格用一对英文双引号 " 括起来，里面的引号写成两个 ""。'
    try:
        for cells in reader:
            if not "".join(cells).strip():
                log.note("有空行，已跳过", line, "行")
            elif not header:
                header = _columns([cell.strip() for cell in cells], log)
            else:
                number += 1
                if len(cells) != len(header):
                    counts = f"文件第 {line} 行有 {len(cells)} 格，列名却有 {len(header)} 个"
                    log.problem(number, "", f"{counts}：{how}空着的格也要留逗号。")
                elif any(cell.startswith(' "') for cell in cells):
                    log.problem(number, "", f"文件第 {line} 行的引号前面有空格，请删掉空格。")
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


def _columns(header: list[str], log: Log) -> list[str]:
    """The column names of a CSV file, checked, so that no row has to repeat their faults."""
    plan, shown = shape(tuple(header)), "".join(f"“{short(name)}”" for name in header)
    for name, count in Counter(header).items():
        if count > 1 and name.lower() in KNOWN:
            log.problem(0, name, f"这一列出现了 {count} 次，请只留一列。")
    if not (plan.said and (plan.who or plan.her)):
        if "，" in header[0]:
            log.stop(f"列名 {shown} 之间要用英文逗号：instruction,input,output。请改过来。")
        if len(plan.missing) == 2 and not any("→" in message for _, message in plan.missing):
            # Names are short, different, and no sentences.
            talk = re.search(r"[。？！?!…吗呢吧]|“（没有|“.{20}", shown) or len({*header}) < len(
                header
            )
            if talk:
                said = f"第一行 {shown} 像是对话，不像列名"
                log.stop(f"{said}：请在它上面加一行 instruction,output。")
            log.stop(
                f"第一行的列名是 {shown}，认不出哪一列是问、哪一列是答：请把问的那一列改名为 instruction，"
                "把她回答的那一列改名为 output。"
            )
        for name, message in plan.missing:
            log.problem(0, name, message)
    if log.count:
        raise DatasetError(log.path, log.problems, log.count)
    return header


def _collect(dialogues: Iterator[list[tuple]], log: Log) -> tuple[tuple, array, bytearray]:
    """Columns, row numbers, which rows are out of a `history`; they end with the first problem."""
    columns, numbers, extra = ([], [], [], []), array("q"), bytearray()
    marks, marked = Counter(), 0
    for turns in dialogues:
        said: list[list[str]] = []
        for number, ask, given, answer, own in turns if not log.count else ():
            texts = (ask, given, answer)
            if own is not False:
                numbers.append(number)
                extra.append(own is None)
                for column, cell in zip(columns, (*texts, said[-TURNS:]), strict=True):
                    column.append(cell)
                for name, text in zip(FIELDS, texts, strict=True):
                    if len(text) > LONG:
                        log.note(f"{name} 超过 {LONG} 个字，notebook 02 会截短或放在一边", number)
                if ask and given:
                    log.note("instruction 和 input 都有内容，在提示里用一个换行接起来", number)
                if len(said) > TURNS:
                    log.note(f"前面超过 {TURNS} 轮，只带着最近的 {TURNS} 轮", number)
                if any(map(shapes.odd, texts)):
                    found = shapes.oddities(texts, number, log)
                    marks.update(found)
                    marked += bool(found)
            if len(turns) > 1:
                said.append([f"{ask}\n{given}" if ask and given else ask or given, answer])
        if len(said) > 1:
            log.note("多轮对话按回答拆成了几条，每条带着前面说过的话（history）", turns[-1][0])
    if marked * 2 > len(numbers):
        seen = "、".join(f"{mark}（{count} 条）" for mark, count in marks.most_common(NAMED))
        held = f"{len(numbers)} 条里有 {marked} 条带着别的格式的记号：{seen}"
        log.note(f"{held}。照原样读入，她会当成话来学：请先在文件里删掉")
    return columns, numbers, extra
