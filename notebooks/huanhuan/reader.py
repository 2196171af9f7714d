"""Room 02's cellar: any dataset file into rows, or a message that helps."""

import ast
import codecs
import csv
import difflib
import json
import math
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from charset_normalizer import from_bytes

from huanhuan import CourseError
from huanhuan.persona import CALLED, NAME

FIELDS = ("instruction", "input", "output")
SHOWN, KEPT = 20, 1000  # problems listed in a message; held in memory, however bad the file is
NAMES, NAMED = 100, 10  # fields or placeholders named in the report; row numbers in a sentence
LONG, FEW = 2000, 10  # characters of a field, rows of a file, of which the report speaks
TURNS = 100  # turns of history a row holds at most: endless dialogues stay linear
SILENCE = 3 * 3600  # ends a conversation in a chat export
EXAMPLE = '{"instruction": "…", "input": "", "output": "…"}'

# The table of shapes: what the parts of a row, and of one spoken line, are called in the files of
# this world, in lower case. Our own name wins; two others leave it open which is meant; the names
# after | count where none before it is there.
SHAPES = {
    "instruction": "instruction prompt question questions query q ask 问题 问 提问 指令 用户 | human user"
    " input inputs content context source src text document article message post",
    "output": "output outputs response responses completion completions answer answers a reply chosen"
    " 回答 答 答案 回复 输出 | target targets tgt assistant bot gpt chatgpt summary",
    "turns": "messages conversations conversation dialogue dialog dialogs turns chat utterances data 对话",
    "input": "input inputs context 输入",
    "history": "history",
    "system": "system system_prompt",
    "rejected": "rejected rejected_response",
    "her": "is_sender issender isself is_self issend is_send from_me is_from_me",
    "who": "role from speaker sender author talker name 角色 人物 说话人 发言人 发送者 发送人 昵称",
    "said": "content value text utterance message msg strcontent line body 台词 对白 内容 消息",
    "room": "room_name roomname talkerid strtalker nickname remark",
    "time": "createtime strtime time timestamp date 时间",
    "type": "type_name type 类型",
}
SHAPES = {part: [tier.split() for tier in names.split("|")] for part, names in SHAPES.items()}
KNOWN = {name for tiers in SHAPES.values() for tier in tiers for name in tier}
ROLES = {"user": "user", "human": "user", "用户": "user", "customer": "user", "system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "ai", "助手"), "assistant")
HERS = {name.lower() for name in (NAME, *CALLED)}
PLAIN = {"", "1", "text", "txt", "文本", "文字", "文本消息"}  # kinds of message that are text
# Marks of bad answers: the one kind says so by a 0, too, the other by a word alone.
FLAGS = {"label", "kto_tag", "weight", "loss", "train", "is_good", "accepted", "liked", "thumbs_up"}
RATED = {"quality", "rating", "feedback", "score"}
GOOD, FALSE = {"true", "1", "1.0", "good"}, {"false", "0", "0.0"}
BAD = {"bad", "rejected", "thumbs_down", "差", "坏", "不好"}
INNER = ("row", "_source", "example", "item", "fields", "data")  # what holds the row itself
SEVERAL = ("instances", "qas", "qa_pairs", "pairs")  # what holds several rows
LISTS = ("answers", "outputs", "responses", "completions")  # each answer is a row of its own
ROW = ("instruction", "output", "turns", "input", "history", "system", "rejected")
EMPTY = ("", None, [], "[]")
SYSTEM = "system 的话没有读入，课程有自己的系统提示"
WRAPS = ("data", "rows", "instances", "examples", "items", "records", "conversations", "dialogues")
TRAIN = ("train", "training", "训练", "训练集")
FORMATS = {"json": "JSON", "jsonl": "JSON Lines", "csv": "CSV 表格", "txt": "剧本（名字：台词）"}

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
TO_PAIRS = f"请整理成一问一答，每条 {EXAMPLE}，或者有 instruction,output 两列的 CSV。"
TEXTS = (  # how text that is no data begins
    (r"version https://git-lfs", "Git LFS 的占位文件", "请下载原始文件。"),
    (r"\s*<[!?a-z]", "网页（HTML）", "可能把网页当数据存下来了，请重新下载原始文件。"),
    (r"WEBVTT|\d+\s*\n\d\d:\d\d:\d\d", "字幕", f"请去掉时间，写成“名字：台词”，{NAME} 的台词以“{NAME}：”开头。"),
    (r"---|- |[\w-]+:\s", "YAML 或配置", f"请用 yaml.safe_load 读出来，再用 json.dump 存成 JSON，每条 {EXAMPLE}。"),
    (r"#+ |\||```|[*>] |!?\[.*\]\(", "Markdown", TO_PAIRS),
    (r"", "文章、小说或剧本", f"{TO_PAIRS}剧本请写成“名字：台词”，每句一行，{NAME} 的台词以“{NAME}：”开头。"),
)  # fmt: skip

_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_BAD = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_blank = re.compile(r"[ \t\r\n]*").match  # what JSON calls white space, nothing else
_JSONISH = re.compile(
    r"^\s*(?:[{｛]|[\[【［]\s*(?:[\[{｛\"'“‘\]/#.]|-?\d+\s*[,\]]|[ntfNTF]\w+|\Z))", re.M
)
_SCENE = re.compile(
    r"\s*(?:第.{1,9}[场幕集回章节]|(?:场景|时间|地点|INT\.|EXT\.)|[-*=—]{3,}\s*$)", re.I
)
_SPEECH = re.compile(
    r"[\s*_>]*([^：:，。！？“”\"…（(【\[]*[^：:，。！？“”\"…（(【\[\d\s])[^：:，。！？“”\"…]{0,20}[：:][\s*_]*(.+)"
)
# What is still to be filled in, and marks of other formats, which would be learnt as text.
_WORD = r"(?:[a-z]+[_ ])*(?:name|author|user|char|bot|assistant|company|developer|creator|owner|team|person)(?:_?\d+)?|\w{0,4}(?:名字|姓名|名称|作者|公司|团队)"
_PLACEHOLDER = re.compile(rf"{{{{\s*[^\W\d]\w*\s*}}}}|{{(?:{_WORD})}}|<(?:{_WORD})>(?![^<]*</)|\[(?:{_WORD})\](?!\()|【(?:{_WORD})】|%(?:{_WORD})%", re.I)  # fmt: skip
_MARK = re.compile(
    r"</?s>|<\|[^\s|]+\|>|\[/?INST\]|<</?SYS>>|</?(?:eos|bos|pad|eot|end_of_turn|start_of_turn)>"
    r"|\[(?:EOS|BOS|END)\]|(?:\bEND|\bSTOP|###|->)(?=\s*\Z)"
    r"|^(?:### *)?(?:Human|Assistant|User|Instruction|Response|Input):|[问答][:：](?<=\A..)", re.M)  # fmt: skip
_odd = re.compile(r"[\[{<【%#>]|END|STOP|Human:|Assistant:|User:|[问答][:：]").search

# Where JSON breaks off: what the parser says (beginning), what stands before, what stands there
# (patterns), and the remedy. The first that fits is given.
NOTHING = '请写上文字；input 没有内容就写 ""。'
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
        super().__init__(_BAD.sub("\ufffd", f"数据集 {path.name} 用不了，什么都没有写入。{body}"))


class _Wrong(Exception):
    """(field, message): what is wrong with a row, said where it is found."""


class _Log:
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
        sentence = f"字段 {_short(name)} 课程用不到，没有读入"
        if (sentence, self.unit) not in self.notes and len(self.notes) >= NAMES:
            sentence = "还有很多别的字段课程也用不到，没有读入"
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
            said.append(_BAD.sub("\ufffd", sentence + f"：第 {named} {unit}" * bool(count) + "。"))
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
    log = _Log(Path(path))
    # Bytes and text get no name here, so that they are freed as soon as they are used up.
    columns, numbers, extra = _collect(_dialogues(_decode(_read(log), log), log), log)
    if log.count:
        raise DatasetError(log.path, log.problems, log.count)
    read = "读的时候：" * bool(log.notes) + "".join(log.report()[:5])
    if not numbers:
        log.stop(f"里面一条对话也没有，请至少写两条：[{EXAMPLE}, {EXAMPLE}]。{read}")
    first = columns[0][0].strip()
    if all(text.strip() == first for text in columns[0]):
        one = "只有一个不同的问题，留不出验证集，请至少写两个不同的问题。"
        log.stop(one + read, field="instruction")
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
    for mark in values.keys() & left.keys():
        report = [said for said in report if not said.startswith(f"占位符 {mark} ")]
        report.append(f"{left.pop(mark)} 条里的 {mark} 换成了“{values[mark]}”。")
    done.attrs |= {"report": report, "placeholders": left}
    return done


def _read(log: _Log) -> bytes:
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


def _decode(raw: bytes, log: _Log) -> str:
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


def _dialogues(text: str, log: _Log) -> Iterator[list[tuple]]:
    """The turns of every dialogue, whatever the format: (number, question, input, answer, own)."""
    if not text.strip():
        log.stop("文件是空的，请先写入对话。")
    suffix = log.path.suffix.lower().removeprefix(".").replace("tsv", "csv")
    first = _LINE.match(text, _blank(text).end())[0]
    known = _header(first)[1]
    if _JSONISH.match(text):
        alone = suffix == "jsonl" and first[0] == "{" and first.strip() == text.strip()
        kind = "jsonl" if alone or _is_jsonl(text, first) else "json"
    elif known > 1 or (suffix == "csv" and (known or re.search("[,;\t，]", first))):
        kind = "csv"
    elif "```" not in text[:2000] and _JSONISH.search(text[:2000]):  # broken in its first line
        kind = "jsonl" if suffix == "jsonl" else "json"
    else:  # a number and the like are JSON, too
        kind = "json" if re.fullmatch(r'\s*(\d+|null|true|false|"[^"]*")\s*', text) else "txt"
    if kind == "txt":
        lines = _messages(_script(text, log), _shape(("role", "content")), log)
        return (yield from _conversations(lines, log))
    if kind != suffix:
        log.note(f"文件名的后缀是 {suffix or '（没有）'}，内容是 {FORMATS[kind]}，已按内容读入")
    rows = {"json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows}[kind](text, log)
    for head in rows:
        rows, plan = chain([head], rows), _plan(head[1]) if type(head[1]) is dict else None
        if plan and plan.missing and plan.said and (plan.who or plan.her):
            return (yield from _conversations(_messages(rows, plan, log), log))
        names = head[1] if type(head[1]) is list and set(map(type, head[1])) == {str} else []
        if names and not _shape(tuple(names)).missing:  # a table, written as arrays of cells
            next(rows)
            rows = ((n, dict(zip(names, cells, strict=False))) for n, cells in rows)
        break
    for number, row in rows:
        for one in _expanded(row, number, log):
            yield _turns(one, number, log)


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


def _json_rows(text: str, log: _Log) -> Iterator[tuple[int, Any]]:
    number, place = 0, _blank(text).end()
    try:
        if text[place] != "[":
            value, place = _value(text, place)
            if place < len(text):
                raise json.JSONDecodeError("After", text, place)
            return (yield from enumerate(_unwrapped(value, log), 1))
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


def _unwrapped(value: Any, log: _Log) -> list:
    """The rows within the outermost value of a JSON file, which is no array."""
    while type(value) is dict and value:
        value.pop(None, None)
        inner = {key: part for key, part in value.items() if type(part) in (list, dict) and part}
        train = next((key for key in inner if key.lower() in TRAIN), None)
        wraps = [key for key in inner if key.lower() in WRAPS] or [*inner]
        plan = _plan(value)
        try:  # written by pandas, column by column
            if {"columns", "data"} <= inner.keys():
                return pd.DataFrame(inner["data"], columns=inner["columns"]).to_dict("records")
            cells = [inner.get(plan.instruction), inner.get(plan.output)]
            if all(cells) and not any(map(_who, cells)):
                return pd.DataFrame(inner, dtype=object).fillna("").to_dict("records")
        except ValueError:
            log.stop('内容是按列写的，可是各列不一样长：请用 orient="records" 重新导出。')
        if train:
            for key in inner.keys() - {train}:
                log.note(f"只读了 {train} 这一部分，{key} 没有读入：02 会自己留出验证集")
            value = inner[train]
        elif _is_row(value):
            return [value]
        elif inner and all(map(_is_row, value.values())):  # orient="index", or rows that have names
            return [*value.values()]
        elif len(wraps) != 1:
            there = "、".join(map(_short, value))
            log.stop(
                f"最外层是单独一个对象，里面是 {there}，认不出对话在哪里：请只留下对话的数组 [{EXAMPLE}, …]。"
            )
        else:
            value = inner[wraps[0]]
    if type(value) is not list:
        log.stop(f"最外层是{_what(value)[0]}，应当是一个数组：[{EXAMPLE}, {EXAMPLE}]。")
    return value


def _is_row(value: Any) -> bool:
    """Whether this is one row, or the turns of one dialogue, and not what holds rows."""
    if type(value) is list:
        one = value[0] if value else None
        sides = (
            {key.lower() for key in one} & ROLES.keys() - {"system"} if type(one) is dict else ()
        )
        return type(one) is str or bool(sides or _who(one))
    if type(value) is not dict:
        return False
    plan, inner = _plan(value), next((value[k] for k in INNER if type(value.get(k)) is dict), None)
    pair = (
        plan.instruction
        and plan.output
        and {type(value[plan.instruction]), type(value[plan.output])} <= {str, list}
    )
    return _is_row(inner) if inner else bool(pair or (plan.turns and _is_row(value[plan.turns])))


def _is_jsonl(text: str, line: str) -> bool:
    """Whether more follows a first line that is one whole value, or a broken one."""
    more = text[_blank(text, text.index(line) + len(line)).end() :][:1]
    try:
        value, end = _value(line, 0)
    except json.JSONDecodeError:
        return line[0] == more == "{" and line.rstrip()[-1] not in "[{,:"
    whole = line[end:].strip() in ("", ",")
    return whole and (more == "[" if type(value) is list else more != "")


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


def _header(line: str) -> tuple[str, int]:
    """The likeliest delimiter of a CSV file, and how many column names we know it gives."""
    cells = {mark: line.strip().replace('"', "").split(mark) for mark in ",;\t"}
    known = {mark: sum(c.strip().lower() in KNOWN for c in cells[mark]) for mark in cells}
    best = max(cells, key=lambda mark: (known[mark], len(cells[mark])))
    return best, known[best]


def _csv_rows(text: str, log: _Log) -> Iterator[tuple[int, Any]]:
    delimiter, _ = _header(_LINE.match(text, _blank(text).end())[0])
    if delimiter != ",":
        name = "分号" if delimiter == ";" else "制表符（Tab）"
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


def _columns(header: list[str], log: _Log) -> list[str]:
    """The column names of a CSV file, checked, so that no row has to repeat their faults."""
    plan, shown = _shape(tuple(header)), "".join(f"“{_short(name)}”" for name in header)
    for name, count in Counter(header).items():
        if count > 1 and name.lower() in KNOWN:
            log.problem(0, name, f"这一列出现了 {count} 次，请只留一列。")
    if not (plan.said and (plan.who or plan.her)):
        if "，" in header[0]:
            log.stop(f"列名 {shown} 之间要用英文逗号：instruction,input,output。请改过来。")
        if len(plan.missing) == 2 and not any("→" in message for _, message in plan.missing):
            # Names are short, different, and no sentences.
            if len({*header}) < len(header) or re.search(r"[。？！?!…]|“（没有|“.{20}", shown):
                log.stop(
                    f"第一行 {shown} 像是对话，不像列名：请在它上面加一行 instruction,output。"
                )
            log.stop(
                f"第一行的列名是 {shown}，认不出哪一列是问、哪一列是答：请把问的那一列改名为 instruction，"
                "把她回答的那一列改名为 output。"
            )
        for name, message in plan.missing:
            log.problem(0, name, message)
    if log.count:
        raise DatasetError(log.path, log.problems, log.count)
    return header


def _script(text: str, log: _Log) -> list[tuple[int, dict | None]]:
    """The lines of a script as rows, None for the border of a scene."""
    gaps = re.search(r"\S[ \t]*\r?\n[ \t]*\S", text)  # else an empty line follows every line
    lines, others, log.unit = [], [], "行"
    for number, match in enumerate(_LINE.finditer(text), 1):
        line = match[0].strip()
        if _SCENE.match(line) or (gaps and not line):
            lines.append((number, None))
        elif speech := _SPEECH.fullmatch(line):
            lines.append((number, {"role": speech[1].strip(" *"), "content": speech[2]}))
        elif line:
            others.append(number)
    what, remedy = next(
        (what, todo) for begins, what, todo in TEXTS if re.match(begins, text, re.I)
    )
    spoken = sum(row is not None for _, row in lines)
    if spoken < 2 or spoken < len(others) or remedy not in (TEXTS[-1][2], TO_PAIRS):
        log.stop(f"这是一篇文字，不是一问一答的数据。看起来是 {what}：{remedy}")
    for number in others:
        log.note("没有“名字：”的是说明，没有读入", number)
    return lines


def _messages(
    rows: Iterable[tuple[int, Any]], plan: SimpleNamespace, log: _Log
) -> Iterator[tuple[int, bool | None, str]]:
    """(number, whether she says it, text) of rows that are one message each; for a border None."""
    who, names, last, room = plan.her or plan.who, {}, None, None
    said = f"（{who}）" * (log.unit == "条")  # the column; a script has none
    log.note(f"每{log.unit}是一句话：她{said}说的是回答，之前别人说的是问题")
    for number, row in rows:
        if type(row) is not dict or not {who, plan.said} <= row.keys():
            if row is not None:
                log.problem(number, plan.said, f"这一条没有 {who} 或 {plan.said}，请补上或删掉。")
            yield number, None, ""
            continue
        name, text = _flag(row[who]), _text(row[plan.said])
        hers = name in ("true", "1") if plan.her else name in HERS or ROLES.get(name) == "assistant"
        names[str(row[who])] = hers
        # In some exports the talker is whoever speaks: then only the others tell one chat from another.
        place = row.get(plan.room) or (room if hers or not plan.her else row.get(plan.who))
        when = _time(row.get(plan.time))
        if (
            ROLES.get(name) == "system"
            or (room and place != room)
            or (last and when - last > SILENCE)
        ):
            yield number, None, ""
        room, last = place, when if when == when else last
        if _flag(row.get(plan.type, "")) not in PLAIN:
            log.note("不是文字的消息没有读入", number)
        elif fault := _fault(text):
            log.problem(number, plan.said, fault)
        elif text.strip() and ROLES.get(name) != "system":
            yield number, hers, text
    if not any(names.values()) and not log.count:
        what = (
            "这是一篇文字，不是一问一答的数据。"
            if log.unit == "行"
            else "每条是一句话，不是一问一答。"
        )
        named = "、".join(map(_short, [*names][:NAMED]))
        log.stop(
            f"{what}开口的{said}有 {named}，没有 {NAME}：请把她的名字改写成 {NAME}，或换成她的角色文件"
            f"（环境变量 HUANHUAN_PERSONA），或者整理成一问一答，每条 {EXAMPLE}。"
        )


def _time(value: Any) -> float:
    """The seconds of a message's time (since 1970, or year, month, day, hour …), NaN where it has none."""
    parts = re.findall(r"\d+", str(value))
    try:
        if len(parts) > 2:
            return datetime(*map(int, parts[:6])).timestamp()
        return float(parts[0]) / (1000 if len(parts[0]) > 11 else 1)
    except (ValueError, IndexError, OverflowError):
        return math.nan


def _conversations(
    lines: Iterable[tuple[int, bool | None, str]], log: _Log
) -> Iterator[list[tuple]]:
    """Dialogues out of single lines: what is said before hers asks, hers in a row are one answer."""
    turns, asked, answered, at = [], [], [], 0
    for number, hers, text in chain(lines, [(0, None, "")]):
        if hers and asked:
            at = at if answered else number
            answered.append(text)
            continue
        if answered:
            turns.append((at, "\n".join(asked), "", "\n".join(answered), True))
            asked, answered = [], []
        if hers:
            log.note("她先开口，前面没有人说话，没有读入", number)
        elif hers is None:
            if asked:
                log.note("最后几句她没有回答，没有读入", at)
            if turns:
                yield turns
            turns, asked = [], []
        else:
            at = number
            asked.append(text)


def _plan(row: dict) -> SimpleNamespace:
    return _shape(tuple(row))


@lru_cache(maxsize=KEPT)  # nearly all rows of a file have the same keys
def _shape(keys: tuple[str, ...]) -> SimpleNamespace:
    """Which key holds which part of SHAPES, which are `flags`, the `rest`, what is `missing`."""
    lower = {key.strip().lower(): key for key in keys if key is not None}
    found, missing = dict.fromkeys(SHAPES), {}
    for part, tiers in SHAPES.items():
        strong, *weak = ([lower[name] for name in tier if name in lower] for tier in tiers)
        if weak and len(strong) > 1 and strong[0] != part:
            missing[part] = f"可能是 {'、'.join(strong)}，认不出是哪一个：请把它改名为 {part}。"
        else:
            found[part] = next(chain(strong, *weak), None)
    if found["input"] == found["instruction"]:  # beside a misspelt name it is none
        alike = difflib.get_close_matches("instruction", lower, 1, 0.75)
        found["instruction" if alike else "input"] = None
    pair = {
        part: [lower[name] for name in SHAPES[part][0] if name in lower]
        for part in ("instruction", "output")
    }
    if "chosen" in lower and not found["instruction"]:  # the whole conversation
        found["turns"] = found["turns"] or lower["chosen"]
    if found["turns"] and not all(pair.values()):
        # Beside the turns of a dialogue only a chosen last answer is of use.
        found |= {"instruction": None, "input": None, "output": lower.get("chosen")}
        found["output"] = None if found["output"] == found["turns"] else found["output"]
        missing = {}
    elif found["instruction"] and found["output"]:
        found["turns"] = None
    else:  # half a pair: a weak name says nothing
        found |= {part: None for part in pair if found[part] not in pair[part]}
    row = [found[part] for part in ROW if found[part]]
    flags = [key for name, key in lower.items() if name in FLAGS | RATED and key not in row]
    rest = [key for key in lower.values() if key not in row + flags]
    for part in FIELDS if not found["turns"] else ():
        like = difflib.get_close_matches(part, [key.strip().lower() for key in rest], 1, 0.75)
        there = "、".join(map(_short, rest[:NAMED]))
        if found[part] or part in missing or (part == "input" and not like):
            continue
        if like:
            there = f"是名字写得不一样吗？{_short(lower[like[0]])} → {part}？请改名"
        else:
            there = (
                f"这里有的是 {there}：是其中哪一个，请把它改名为 {part}；问和答连在一段里的，请先拆开"
                if rest
                else "请补上"
            )
        missing[part] = f"缺少这个字段，{there}。"
    moved = [part for part in FIELDS if found[part] and found[part] != part]
    renamed = f"字段 {'、'.join(found[p] for p in moved)} 换成了 {'、'.join(moved)}" * bool(moved)
    sides = {found[part] for part in FIELDS} - {None}
    plain = not (missing or flags or rest or found["turns"]) and sides == {*row}
    return SimpleNamespace(
        **found,
        plain=plain,
        flags=flags,
        rest=rest,
        missing=[*missing.items()],
        renamed=renamed,
    )


def _short(name: Any) -> str:
    return str(name)[:40] or "（没有名字）"


def _flag(value: Any) -> str:
    return str(value).strip().lower()


def _bad(row: dict, plan: SimpleNamespace) -> str:
    """What in a row or turn says that its answer is a bad one, "" where nothing does."""
    for key in plan.flags:
        if (word := _flag(row[key])) in BAD or (word in FALSE and key.lower() in FLAGS):
            return f"{_short(key)}: {word}"
    alone = plan.rejected and not (plan.output or plan.turns)
    return "rejected" if alone or (plan.rejected and row[plan.rejected] is True) else ""


def _expanded(row: Any, number: int, log: _Log) -> Iterator[Any]:
    """The row within a row, or all rows within it, or one for each of several answers."""
    if type(row) is not dict:
        return (yield row)
    if inner := next((row[key] for key in INNER if type(row.get(key)) is dict), None):
        if row.get("truncated_cells"):
            log.problem(number, "", "网页把这一条截短了（truncated_cells），请下载原始文件。")
        row = inner
    plan = _plan(row)
    for name in SEVERAL:
        if type(row.get(name)) is list and all(type(one) is dict for one in row[name]):
            log.note(f"{name} 里的每一项各成一条", number)
            others = {key: value for key, value in row.items() if type(value) is str}
            return (yield from (others | one for one in row[name]))
    answers = row.get(plan.output) if _flag(plan.output) in LISTS else None
    if type(answers) is list and len(answers) > 1 and type(row.get(plan.instruction)) is str:
        log.note(f"{plan.output} 里的每个回答各成一条", number)
        yield from (row | {plan.output: one} for one in answers)
    else:
        yield row


def _turns(row: Any, number: int, log: _Log) -> list[tuple]:
    """Check one row: its turns. All its faults are reported, of a dialogue the first."""
    turns, lines, missing, asked, given, field, where = [], [], [], None, "", "", ""
    if type(row) is dict:
        for key in row.pop(None, ()):
            log.problem(number, key, "这个字段写了不止一次，请只留一个。")
        plan = _plan(row)
        if plan.plain:  # nearly all rows of this world: no need to go the long way
            texts = (row[plan.instruction], row[plan.input] if plan.input else "", row[plan.output])
            clean = all(type(text) is str and not _BAD.search(text) for text in texts)
            if clean and texts[0].strip() and texts[2].strip():
                if plan.renamed:
                    log.note(plan.renamed, number)
                return [(number, *texts, True)]
        if bad := _bad(row, plan):
            log.note(f"标着 {bad} 的是不好的回答，没有读入", number)
            return []
        missing = plan.missing
        for name, message in missing:
            log.problem(number, name, message)
    try:
        if type(row) not in (dict, list):
            raise _Wrong("", f"这一条应当是 {EXAMPLE}，这里却是{_what(row)[0]}。")
        spoken = list(_said(row, "", "", "user", number, log))
    except _Wrong as wrong:
        log.problem(number, *wrong.args)
        return []
    named = any(type(who) is str and who.strip().lower() in HERS for who, *_ in spoken)
    for who, content, own, field, where in spoken:
        text, role = _text(content), ROLES.get(_flag(who))
        if named and role != "system":  # people of a play: several may speak before she does
            role = "assistant" if _flag(who) in HERS else "user"
        expected = "user" if asked is None else "assistant"
        fault = _fault(text) and f"{'的内容' * bool(where)}{_fault(text)}"
        if role == "system":
            log.note(SYSTEM, number)
            continue
        if who is None:
            given = given if fault else text
        elif role is None:
            said = _short(who) if type(who) is str else _what(who)[0]
            fault = f"的角色不认识：{said}。请改成其中之一：{'、'.join(ROLES)}。"
        elif role != expected and not named and not missing:
            fault = (
                f"是 {who} 说的，这里应当轮到 {expected}：请补上缺的那句，或把相连的两句并成一句。"
            )
        elif not fault and not text.strip() and not (role == "user" and given.strip()):
            fault = f"是空的，请写上{'她的回答' if role == 'assistant' else '对她说的话'}。"
        if fault:
            log.problem(number, field, where + fault)
            if where:
                return []
        if role == "assistant":
            turns.append((number, asked, given, text, own))
            asked, given = None, ""
        elif who is not None:
            asked = text
        lines += [(number, role == "assistant", text)] * named
    if missing:
        return []
    if named:
        return [turn for made in _conversations(lines, log) for turn in made]
    if asked is not None or not turns:
        fault = "最后一句应当是 assistant 的回答：请补上回答，或删掉没有回答的那句。"
        log.problem(number, field or (plan.turns if type(row) is dict else ""), fault)
        return []
    if where:
        log.note(
            f"{f'{field} ' if field else '数组'}里的一问一答换成了 instruction、output", number
        )
    return turns


def _said(
    value: Any, field: str, where: str, role: str, number: int, log: _Log
) -> Iterator[tuple[Any, Any, bool | None, str, str]]:
    """(who, content, own, field, place) of all that a row, a turn or a list of turns says.

    An input has None for who; `own` is False where the answer is not to be learnt, None where it is
    out of a `history`.
    """
    if type(value) is list and len(value) == 2 and type(value[0]) is str and value[0] in ROLES:
        yield value[0], value[1], True, field, where
    elif type(value) is list:
        for place, one in enumerate(value, role == "assistant"):
            at = where or f"第 {place + (role == 'user')} 句"
            who = "assistant" if place % 2 and type(one) is not list else "user"
            yield from _said(one, field, at, who, number, log)
    elif type(value) is str and where:
        yield role, value, True, field, where
    elif type(value) is not dict:
        what = f' {{"role": "{role}", "content": "…"}}' if where else "一个数组，一问一答轮流写"
        raise _Wrong(field, f"{where}应当是{what}，这里却是{_what(value)[0]}。")
    else:
        yield from _spoken(value, field, where, number, log)


def _spoken(value: dict, field: str, where: str, number: int, log: _Log) -> Iterator[tuple]:
    """The same of a row or turn that is an object."""
    if repeated := value.pop(None, None):
        raise _Wrong(field, f"{where}的字段 {_short(repeated[0])} 写了不止一次，请只留一个。")
    plan, own = _plan(value), True
    if where and (bad := _bad(value, plan)):
        log.note(f"对话里标着 {bad} 的回答只当作前文，没有读入", number)
        own = False
    pair = plan.instruction and plan.output
    line = plan.who and plan.said and not pair and not plan.turns
    for name in plan.rest + [key for key in plan.flags if _flag(value[key]) not in GOOD]:
        if name not in ((plan.who, plan.said) if line else ROLES):
            log.unused(f"{field}.{name}".lstrip(".") if where else name, number)
    if plan.system and value[plan.system] not in EMPTY:
        log.note(SYSTEM, number)
    if plan.rejected and value[plan.rejected] not in (*EMPTY, False):
        log.note("rejected 是不好的回答，没有读入", number)
    if plan.renamed and not where:
        log.note(plan.renamed, number)
    if plan.history and value[plan.history] not in EMPTY:
        log.note("history 是这一条的前文，其中的回答也各成一条", number)
        turns = _said(_parsed(value[plan.history]), "history", "", "user", number, log)
        yield from ((who, content, None, *at) for who, content, _, *at in turns)
    ask, answer = value.get(plan.instruction), value.get(plan.output)
    ask, answer = (one[0] if type(one) is list and len(one) == 1 else one for one in (ask, answer))
    if line:
        yield value[plan.who], value[plan.said], own, field, where
    elif plan.turns:
        yield from _said(_parsed(value[plan.turns]), plan.turns, "", "user", number, log)
        if plan.output:
            answer = answer if type(answer) is list else [answer]
            yield from _said(answer, plan.output, "", "assistant", number, log)
    elif type(ask) is type(answer) is list and len(ask) == len(answer) and type(ask[0]) is str:
        both = [text for pair in zip(ask, answer, strict=True) for text in pair]
        yield from _said(both, plan.output, "", "user", number, log)
    elif pair or not where:
        whole = _who(answer) and any(ROLES.get(_who([one])) == "user" for one in answer)
        for who, name, cell in (
            (None, plan.input, value.get(plan.input)),
            ("user", plan.instruction, ask),
            ("assistant", plan.output, answer),
        ):
            if not name or (whole and who == "user"):
                continue
            if who and _who(cell):
                cell = cell if type(cell) is list else [cell]
                yield from _said(cell, name, "", who, number, log)
            else:
                yield who, cell, own, field if where else name, where
    elif named := [key for key in value if key.lower() in ROLES]:
        yield from ((key.lower(), value[key], own, field, where) for key in named)
    else:
        there = "、".join(map(_short, value))
        raise _Wrong(
            field,
            f'{where}应当写明谁说的：{{"role": "user", "content": "…"}}，这里有的是 {there}。',
        )


def _who(value: Any) -> str:
    """Who speaks in a turn, or in the first of several; "" where this is no turn."""
    value = value[0] if type(value) is list and value else value
    plan = _plan(value) if type(value) is dict else None
    return _flag(value[plan.who]) if plan and plan.who and plan.said else ""


def _parsed(cell: Any) -> Any:
    """The list that the cell of a table holds as JSON, or as Python writes it (pandas does)."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell.strip()) if type(cell) is str else cell
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def _text(content: Any) -> Any:
    """The text of a turn whose content is a list of parts, all of them text; else as it is."""
    parts = content if type(content) is list else [None]
    if all(type(part) is dict and type(part.get("text")) is str for part in parts):
        return "".join(part["text"] for part in parts) or content
    return content


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
    if type(value) is list:
        return "一个数组 [ ]", "请合成一段文字，换行写作 \\n；有几个回答的，只留好的那个。"
    if type(value) in (dict, str):
        return (
            "一个对象 { }" if type(value) is dict else "一段文字"
        ), "请去掉花括号，只留一段文字。"
    written = str(value)[:40]
    written = written.lower() if type(value) is bool else written
    return f" {written}", f'请加上引号，写成 "{written}"，或换成文字。'


def _collect(
    dialogues: Iterator[list[tuple]], log: _Log
) -> tuple[tuple[list, ...], array, bytearray]:
    """The columns, the row numbers, and which rows are out of a `history`.

    With the first problem they stop growing.
    """
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
                if _odd(ask) or _odd(given) or _odd(answer):
                    found = _oddities(texts, number, log)
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


def _oddities(texts: tuple[str, ...], number: int, log: _Log) -> set[str]:
    """Note the placeholders in a row; returns the marks of other formats."""
    for mark in {mark for text in texts for mark in _PLACEHOLDER.findall(text)}:
        if mark in log.placeholders or len(log.placeholders) < NAMES:
            sentence = f"占位符 {mark} 还没有换成真的内容，照这样训练，她会原样说出来"
            log.placeholders[mark] = sentence
            log.note(sentence, number)
    return {mark.strip() for text in texts for mark in _MARK.findall(text)}
