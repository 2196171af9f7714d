"""Room 02's cellar: any dataset file into rows, or a message that helps.

The text of a file becomes values, one a row (JSON, JSON Lines, CSV, a script). A row, whatever its
shape, becomes lines (who says what), which one check turns into questions and answers.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from charset_normalizer import from_bytes

from huanhuan import CourseError
from huanhuan.persona import CALLED, NAME

SHOWN, KEPT = 20, 1000  # problems in a message; found before reading ends, however bad the file
NAMED, NOTES = 10, 100  # row numbers in a sentence of the report; sentences of an odd file
FEW = 10  # rows of a file, of which the report speaks
TURNS = 100  # turns of history a row holds at most: endless dialogues stay linear
SILENCE = 3  # hours without a word, after which a chat is another conversation
FIELDS = ("instruction", "input", "output")
HER = "assistant"  # the role
EXAMPLE = '{"instruction": "…", "input": "", "output": "…"}'
ARRAY = f"请写成对话的数组：[{EXAMPLE}, {EXAMPLE}]。"
SYSTEM = "system 的话没有读入，课程有自己的系统提示"

# The table of shapes: what the parts of a row, and of one spoken line, are called in the files of
# this world, in lower case. Our own name wins; two others leave it open which is meant; the names
# after | count where none before it is there, and only beside the other half of the pair.
SHAPES = {
    "instruction": "instruction prompt question questions query q ask 问题 问 提问 指令 用户 | human user"
    " input inputs content context source src text document article message post",
    "output": "output outputs response responses completion completions answer answers a reply chosen"
    " chosen_response response_chosen 回答 答 答案 回复 输出 | target targets tgt assistant bot gpt chatgpt summary",
    "turns": "messages conversations conversation dialogue dialog dialogs turns chat utterances data 对话",
    "input": "input inputs context 输入",
    "history": "history chat_history dialog_history 历史",
    "system": "system system_prompt",
    "chosen": "chosen chosen_response response_chosen",
    "rejected": "rejected rejected_response response_rejected",
    "her": "is_sender issender isself is_self issend is_send ismysend from_me is_from_me",
    "who": "role from speaker sender author talker name 角色 人物 说话人 发言人 发送者 发送人 昵称",
    "said": "content value text utterance message msg strcontent line body 台词 对白 内容 消息",
    "room": "room_name roomname talkerid strtalker talker nickname remark",
    "scene": "conversation_id dialog_id dialogue_id session_id scene episode 场景 场次 集 会话",
    "time": "createtime strtime time timestamp date datetime 时间 日期",
    "type": "type_name type 类型",
}
SHAPES = {part: [tier.split() for tier in names.split("|")] for part, names in SHAPES.items()}
KNOWN = {name for tiers in SHAPES.values() for tier in tiers for name in tier}
PARTS = (*FIELDS, "turns", "history", "system", "rejected")
ROLES = dict.fromkeys(("user", "human", "prompter", "用户", "客户", "customer"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "ai", "助手"), "assistant")
ROLES |= {"system": "system", "developer": "system"}
HERS = {name.lower(): HER for name in (NAME, *CALLED)}
_role = (ROLES | HERS | {"input": "input"}).get
# What marks bad answers, and how; of any other mark nothing is certain.
FLAGS = {"label", "kto_tag", "weight", "loss", "train", "is_good", "accepted", "chosen", "status"}
BAD = {"false", "0", "0.0", "-1", "bad", "negative", "undesirable", "rejected", "差", "坏", "不好"}
GOOD = {"true", "1", "1.0", "good", "positive", "desirable", "accepted", "none", "", "好"}
PLAIN = {"", "1", "text", "txt", "文本", "文字", "文本消息"}  # messages of a chat that are text
TRAIN = ("train", "training", "训练")  # where files keep their rows
WRAPS = (*TRAIN, "data", "rows", "instances", "examples", "items", "records", "dialogues")
PROSE = f"这是一篇文字，不是一问一答的数据：请整理成 JSON，每条 {EXAMPLE}，或有 instruction,output 两列的 CSV。网页请重新下载原始文件，YAML 请转存成 JSON；剧本请写成“名字：台词”，每句一行，她的名字写成 {NAME}"
QUOTING = '有逗号、换行或引号的格子，整格用一对英文双引号 " 括起来，里面的引号写成两个 ""；引号前没有空格，空着的格也要留逗号。'
CELLS = "文件第 {} 行有 {} 格，列名有 {} 个：" + QUOTING
NOT_TEXT = '应当是一段文字，不是数字、true、null、数组或对象：请写成带引号的文字，input 没有内容就写 ""；有几个回答的，只留好的那个。'
BINARY = "文件不是文字，是认不出的编码，或者损坏了：Excel、PDF 等请用原来的程序打开，另存为“CSV UTF-8（逗号分隔）”，压缩包请先解压；下载来的请重新下载，写好的请在编辑器里另存为 UTF-8。"
UNFIT_IS = "（乱码、控制字符或半个表情），请对照原文改正，或者删掉。"
RENAME = "请把问的那一个改名为 instruction，把她回答的那一个改名为 output（没有就补上，连在一起就拆开，有几个回答的只留好的）。"
HEADER = "第一行应当是列名，这里是 “{}”（之间用英文逗号；第一行就是对话的，请在它上面加一行 instruction,output）。"
PLACEHOLDER = "占位符 {} 还没有换成真的内容，照这样训练，她会原样说出来"
# Of broken JSON: how the parser's words begin, what stands there (after one character), remedy.
REMEDIES = (
    ("Unterminated", "", '这里没有结束的引号 " 或括号：自己写的，请补上；后面本来还有内容的，是文件不完整，请重新下载或导出。'),
    ("Invalid", "", '文字里的换行和制表符（Tab）要写成 \\n、\\t，反斜杠 \\ 要写成 \\\\，别的控制字符请删掉；文字到此为止的，请补上引号 "。'),
    ("", r".(//|/\*|#|…|\.\.|(None|True|False|nan|inf|undefined|NULL)\b)", 'JSON 里没有别的语言（如 Python）的写法：不能写注释、省略号，请删掉；None、True、nan 请写成文字，没有内容就写 ""。'),
    ("Extra", "", "内容到这里已经结束，请删掉后面多出来的东西；有几个数组的，请并成一个。"),
    ("", r".?,\s*[\]},]", "多了一个逗号：最后一项后面没有逗号，请删掉。"),
    ("", ".['“‘’”＂「」『』，、；;：=【】［］｛｝()（）]", '这里的标点应当是英文的：双引号 " 逗号 , 冒号 : 括号 [ ] { }，不能是单引号，也不能是全角的。'),
    ("", "", f'这里的逗号、冒号、引号或括号不对：JSON 文件应当是 [{EXAMPLE}, …]，字段名带英文双引号，后面是英文冒号；也可能少了一个英文逗号；前面那段文字里的英文双引号要写成 \\"，它结尾的引号不能是全角的；大括号、方括号要各自配对。'),
)  # fmt: skip
EARLIER = f"多轮对话每个回答成了一条，带着之前（最多 {TURNS} 轮）的话（history）"
LINES = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
UNFIT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")  # to be learnt
_blank = re.compile(r"[ \t\r\n]*").match  # what JSON calls white space, nothing else
_jsonish = re.compile(r"(?:\s*(?:#|/[/*]).*\n)*\s*(?:\{(?!\\rtf)|｛|[\[【［]\s*(?:[\[{｛\"'“/#\]]|\Z))").match  # fmt: skip
_scene = re.compile(r"第[\d一二三四五六七八九十百零〇 ]{1,6}[场幕集回章节]|(?:场景|时间|地点|人物|出场)\s*[：:]|(?:INT|EXT)\.|[-*=—]{3,}$").match  # fmt: skip
_speech = re.compile(r"[\s*_>-]*(?!\d|旁白|字幕|画外音)([^：:，。！？“”\"…（(【\[]{1,20}?)\s*(?:OS|VO|[（(【\[][^：:]*)?[\s*_]*[：:][\s*_]*(.+)").fullmatch  # fmt: skip
_no_words = re.compile(r"\s*(?:(?:\[(?:图片|表情|动画表情|语音|视频|文件|链接|位置|红包|转账|名片)[^]]*\]\s*)+|.{0,40}撤回了一条消息.{0,9}|<(?:\?xml|msg)\b.*)", re.S).fullmatch  # fmt: skip
# What is still to be filled in, and marks of other formats, which would be learnt as text.
_WORD = r"(?:[a-z]+[_ ])*(?:name|author|user|char|bot|company|developer|creator|owner)|\w{0,4}(?:名字|姓名|作者|公司)"
_TO_FILL = re.compile(rf"{{{{\s*[^\W\d][\w.]*\s*}}}}|{{(?:{_WORD})}}|<(?:{_WORD})>(?![^<]*</)|\[(?:{_WORD})\](?!\()|【(?:{_WORD})】", re.I)  # fmt: skip
_MARK = re.compile(r"</?s>|<[|｜][^\s|｜]+[|｜]>|\[/?(?:INST|EOS|SEP)\]|<</?SYS>>|</?(?:eo[sahm]|bos|pad|(?:start|end)_of_turn)>|(?<!#)###(?=\s*$|\s*\w+\s*[:：])|\b(?:END|STOP)(?=\s*$)|^(?:Human|Assistant)[:：]", re.M)  # fmt: skip
_odd = re.compile(r"[\[{<【]|###|END|STOP|uman[:：]|ssistant[:：]").search  # most rows hold none


class DatasetError(CourseError):
    """A dataset that cannot be used: `problems` lists (row, field, message), row 0 the whole file."""

    def __init__(self, path: Path, problems: list[tuple[int, str, str]]):
        self.problems, lines = problems, []
        for row, field, message in problems[:SHOWN]:
            where = "的 ".join([f"第 {row} 条"] * bool(row) + [field[:40]] * bool(field))
            lines.append(f"{where}：{message}" if where else message)
        if (more := len(problems) - SHOWN) > 0:
            lines.append(f"……另外{'还有' if more + SHOWN < KEPT else '不止'} {more} 处问题")
        body = "\n  ".join([""] * (len(lines) > 1) + lines)
        # It quotes the file: nothing that a terminal could not print.
        super().__init__(UNFIT.sub("\ufffd", f"数据集 {path.name} 用不了，什么都没有写入。{body}"))


class Log:
    """What is found while a file is read: problems, and notes for the report."""

    def __init__(self, path: Path):
        self.path, self.problems = path, []
        self.row, self.unit = 0, "条"  # the current row; rows are counted, or lines of a script
        self.notes: dict[str, list[int]] = {}  # sentence -> the rows it holds for

    def problem(self, *problem: Any) -> None:
        self.problems.append(problem)
        if len(self.problems) >= KEPT:
            raise DatasetError(self.path, self.problems)

    def stop(self, message: str, row: int = 0, field: str = "") -> NoReturn:
        """Raise DatasetError now: this problem, then those found before."""
        raise DatasetError(self.path, [(row, field, message), *self.problems])

    def note(self, sentence: str, number: int = 0) -> None:
        if sentence not in self.notes and len(self.notes) >= NOTES:
            sentence = "还有很多别的情况，没有一一列出"
        numbers = self.notes.setdefault(sentence, [])
        if number and numbers[-1:] != [number]:
            numbers.append(number)

    def report(self) -> list[str]:
        said = []
        for sentence, rows in self.notes.items():
            many = f" 等 {len(rows)}" * (len(rows) > NAMED)
            where = f"：第 {'、'.join(map(str, rows[:NAMED]))}{many} {self.unit}" * bool(rows)
            said.append(UNFIT.sub("\ufffd", f"{sentence}{where}。"))
        return said


def load_rows(path: str | Path) -> pd.DataFrame:
    """Read and check a dataset: JSON, JSON Lines, CSV or a script, told apart by content.

    Returns one answer a row: ``instruction``, ``input``, ``output``, and ``history``, what was said
    before as a list of [question, answer]. The index counts the rows of the file, or the lines of a
    script. ``attrs["report"]`` lists, in Chinese, what was recognised, converted, left out or
    noticed, ``attrs["placeholders"]`` how many rows hold each. Raises DatasetError.
    """
    log = Log(Path(path))
    try:  # the text gets no name here, so that it is freed as soon as it is used up
        rows, numbers, past, holds = _collected(_dialogues(_values(_text(log), log), log), log)
    except RecursionError:
        log.stop(f"括号套得太深了，一条对话应当是 {EXAMPLE}。", log.row)
    if log.problems:
        raise DatasetError(log.path, log.problems)
    if len({ask.strip() for ask, *_ in rows}) < 2:
        what = "只有一个不同的问题，留不出验证集" if rows else "里面一条对话也没有"
        read = "读的时候：" * bool(log.notes) + "".join(log.report()[:5])
        log.stop(f"{what}，请至少写两条问题不同的。{ARRAY}{read}")
    table = pd.DataFrame(rows, numbers, [*FIELDS, "history"], dtype=object)
    hashes = (hash((*texts, *map(tuple, turns))) for *texts, turns in rows)
    keys = pd.Series(np.fromiter(hashes, "int64", len(rows)))
    again = keys[np.argsort(past, kind="stable")].duplicated().sort_index().to_numpy()
    # An answer out of a `history`, which may be cut off, counts only where no row of its own has it.
    hashes = (hash(("\n".join(filter(None, row[:2])), row[2])) for row in rows)
    keys = pd.Series(np.fromiter(hashes, "int64", len(rows)))
    spare = (again | keys.isin(keys[~np.array(past)]).to_numpy()) & past
    for number in table.index[spare]:
        log.note("history 里的回答在文件里另有一条，没有重复读入", number)
    for number in table.index[again & ~spare]:
        log.note("与前面某一条完全相同，照样留着", number)
    table = table[~spare]
    if len(table) < FEW:
        log.note(f"只有 {len(table)} 条，教不会她什么，请尽量写到几十条以上")
    table.attrs |= {"report": log.report(), "placeholders": holds}
    return table


def fill_placeholders(rows: pd.DataFrame, values: dict[str, str]) -> pd.DataFrame:
    """`rows` with each placeholder of `values`, such as ``{"{{name}}": NAME}``, replaced everywhere."""
    marks = re.compile("|".join(map(re.escape, values)) or "(?!)")

    def filled(part: str | list) -> str | list:
        text = type(part) is str
        return marks.sub(lambda mark: values[mark[0]], part) if text else [*map(filled, part)]

    done, report = rows.apply(lambda column: column.map(filled)), rows.attrs["report"]
    for mark, value in values.items():
        new = f"占位符 {mark} 换成了“{value}”"
        report = [said.replace(PLACEHOLDER.format(mark), new) for said in report]
    left = {mark: n for mark, n in rows.attrs["placeholders"].items() if mark not in values}
    done.attrs |= {"report": report, "placeholders": left}
    return done


def _text(log: Log) -> str:
    """The text of the file, which nobody may be writing to, in any common encoding."""
    try:
        before = log.path.stat()
        if not log.path.is_file():  # reading a pipe could wait for ever
            log.stop("这不是普通文件，是文件夹、管道或设备：请写出数据文件本身的名字。")
        raw, after = log.path.read_bytes(), log.path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        log.stop(f"文件 {log.path} 打不开（{error}）：请检查文件名、文件夹和读它的权限。")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        log.stop("文件在读的时候变了，可能还在上传或保存，请等它写完，再运行一次。")
    text = None
    with suppress(UnicodeDecodeError):
        text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8")
    if text is None or text.count("\0", 0, 4096) * 10 > len(text[:4096]):
        likely = ["gb18030", "big5", "utf_16_le", "utf_16_be"]
        best = from_bytes(raw, cp_isolation=likely, enable_fallback=False).best()
        if not best:
            log.stop(BINARY)
        log.note(f"文件不是 UTF-8，是 {best.encoding.upper()} 编码，已按这种编码读入")
        text = raw.decode(best.encoding, "replace")  # what it replaces is refused later
    return text.lstrip("\ufeff")


def _values(text: str, log: Log) -> Iterator[tuple[int, Any]]:
    """The number and the value of every row, whatever the format."""
    head = LINES.match(text, _blank(text).end())
    if not head:
        log.stop("文件是空的，请先写入对话。")
    known = sum(cell.strip(' "\r\n').lower() in KNOWN for cell in re.split("[,;\t]", head[0]))
    if (known > 1 or log.path.suffix.lower() in (".csv", ".tsv")) and not _jsonish(text):
        return _csv_rows(text, head[0], log)
    return _json_rows(text, head[0], log) if _jsonish(text) else _script(text, log)


def _json_rows(text: str, head: str, log: Log) -> Iterator[tuple[int, Any]]:
    """The items of an array, or one value after another, as in JSON Lines."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len(value := dict(pairs)) < len(pairs):  # which of them is meant?
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            log.stop("同一个对象里写了不止一次，请只留一个。", log.row, twice)
        return value

    # int() takes only so many digits.
    decoder = json.JSONDecoder(object_pairs_hook=once, parse_int=Decimal)
    place = _blank(text).end()
    below = _blank(text, place + len(head)).end()
    array = head[0] == "[" and not (text[below : below + 1] == "[" and head.rstrip()[-1] == "]")
    place = _blank(text, place + array).end()
    try:
        while text[place : place + 1] != "]" * array:  # "" is found where the text ends
            log.row += 1
            value, place = decoder.raw_decode(text, place)
            place = _blank(text, place).end()
            if log.row == 1 and not array and place == len(text):
                return (yield from enumerate(_unwrapped(value, log), 1))
            yield log.row, value
            if array and (text[place : place + 1] or " ") not in ",]{[":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = _blank(text, place + (text[place : place + 1] == ",")).end()
        if (place := _blank(text, place + array).end()) < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        before, here = text[max(0, error.pos - 60) : error.pos].rstrip(), text[error.pos :][:40]
        says, at = error.msg if here.strip() else "Unterminated", (before[-1:] or " ") + here
        remedy = next(r for msg, spot, r in REMEDIES if says.startswith(msg) and re.match(spot, at))
        near = " ".join((before[-12:] + here[:12]).split())
        where = f"文件第 {error.lineno} 行第 {error.colno} 个字符（{near}）附近不合 JSON 的写法"
        log.stop(f"{where}：{remedy}", log.row)


def _csv_rows(text: str, head: str, log: Log) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # Python refuses cells beyond 128 KiB
    lines, delimiter = (match[0] for match in LINES.finditer(text)), max(",;\t", key=head.count)
    reader, header = csv.reader(lines, delimiter=delimiter, strict=True), []
    filled = (cells for cells in reader if "".join(cells).strip())  # no empty lines
    try:
        header = [cell.strip() for cell in next(filled, [])]
        twice = any(header.count(name) > 1 for name in {*header} & KNOWN)
        if twice or _plan(tuple(header)).missing:
            fault = "同名的列请只留一列。" if twice else RENAME
            log.stop(HEADER.format("”“".join(header)[:400]) + fault)
        for log.row, cells in enumerate(filled, 1):
            if len(cells) == len(header) and not any(cell.startswith(' "') for cell in cells):
                yield log.row, dict(zip(header, cells, strict=True))
            else:
                log.problem(log.row, "", CELLS.format(reader.line_num, len(cells), len(header)))
    except csv.Error:  # Python 3.10 refuses NUL, too
        log.stop(f"从这里起引号没有配对，或者有空字符：{QUOTING}", log.row + bool(header))


def _script(text: str, log: Log) -> Iterator[tuple[int, Any]]:
    """The lines of a script in which she speaks, as messages; {} is the border of a scene."""
    gaps = re.search(r"\S[ \t]*\r?\n[ \t]*\S", text)  # else an empty line follows every line
    rows, others, log.unit = [], 0, "行"
    for number, match in enumerate(LINES.finditer(text), 1):
        line = match[0].strip()
        if _scene(line) or not line:
            if rows and (line or gaps):
                rows.append((number, {}))
        elif speech := _speech(line):
            rows.append((number, {"role": speech[1].strip(" *"), "content": speech[2]}))
        else:
            others += 1
            log.note("没有“名字：”的没有读入，是台词的请接在上一行后面", number)
    names = [*dict.fromkeys(row["role"] for _, row in rows if row)]
    if len(rows) < others or not any(_role(_word(name)) == HER for name in names):
        log.stop(f"{PROSE}（这里开口的有：{'、'.join(names[:NAMED]) or '没有人'}）。")
    yield from rows


def _word(value: Any) -> str:
    return "" if type(value) in (list, dict) else str(value).strip().lower()


@lru_cache(maxsize=1000)  # nearly all rows of a file have the same keys
def _plan(keys: tuple[str, ...]) -> SimpleNamespace:
    """Which key is which part of SHAPES, which are `flags` or the `rest`, what is `missing`."""
    lower = {key.strip().lower(): key for key in keys} | {key: key for key in keys}
    found, strong = {}, {}
    for part, tiers in SHAPES.items():
        first, *others = ([lower[name] for name in tier if name in lower] for tier in tiers)
        open_ = others and len(first) > 1 and first[0].lower() != part  # which of them?
        found[part], strong[part] = None if open_ else next(chain(first, *others), None), first
    if found["input"] == found["instruction"]:  # beside a misspelt name it asks nothing
        alike = any(name.startswith("ins") for name in lower.keys() - KNOWN)
        found["instruction" if alike else "input"] = None
    if not (strong["instruction"] and strong["output"]) and (found["turns"] or found["chosen"]):
        # Beside the turns of a dialogue only a chosen last answer is of use.
        found |= {"instruction": None, "input": None, "output": found["turns"] and found["chosen"]}
        found["turns"] = found["turns"] or found["chosen"]  # a whole conversation
    else:
        found["turns"] = None
    read = found["turns"] or (found["instruction"] and found["output"])
    line = bool((found["her"] or found["who"]) and found["said"] and not read)
    line = line and not (strong["instruction"] or strong["output"] or "parent_id" in lower)
    if line:
        found |= dict.fromkeys(FIELDS)
    used = {found[part] for part in (("who", "said") if line else PARTS)}
    flags = [key for name, key in lower.items() if name in FLAGS and key not in used]
    rest = [key for key in keys if key not in used and key not in flags]
    lost = [part for part in ("instruction", "output") if not (strong[part] and found[part])]
    have = "、".join(keys[:NAMED])[:200] or "空的"
    fault = f"缺少 {'、'.join(lost)}，这里有的是 {have}：{RENAME}"
    moved = [part for part in FIELDS if found[part] not in (None, part)]
    renamed = f"字段 {'、'.join(found[p] for p in moved)} 换成了 {'、'.join(moved)}" * bool(moved)
    found |= {"line": line, "flags": flags, "rest": rest, "renamed": renamed, "fault": fault}
    return SimpleNamespace(**found, missing="" if read or line else lost[0])


def _talks(value: Any) -> bool:
    one = value[0] if type(value) is list and value else None
    return type(one) is dict and (_plan(tuple(one)).line or not ROLES.keys().isdisjoint(one))


def _unwrapped(value: Any, log: Log) -> list:
    """The rows within the outermost value of a JSON file that is no array."""
    while type(value) is dict:
        inner = {key: part for key, part in value.items() if type(part) in (list, dict) and part}
        plan, wrap = _plan(tuple(value)), next((key for key in WRAPS if key in inner), None)
        if _talks(turns := inner.get(plan.turns)):  # one dialogue, or the messages of a chat
            return turns if _plan(tuple(turns[0])).her else [value]
        if not (plan.turns or plan.missing or plan.output in inner):
            return [value]
        if plan.output in inner or "columns" in inner:  # pandas wrote columns, lists or "split"
            try:
                table = pd.DataFrame(inner.get("data", inner), None, inner.get("columns"), object)
                return table.set_axis([*map(str, table)], axis=1).to_dict("records")
            except Exception:  # pandas has one of its own for every way to be wrong
                log.stop(f"内容是按列写的，可是各列不一样长，或者缺了格子。{ARRAY}")
        if not wrap and all(type(part) is dict or _talks(part) for part in value.values()):
            return [*value.values()]  # orient="index", or dialogues with names
        if not wrap and len(inner) != 1:
            log.stop(f"最外层是一个对象（{'、'.join(value)[:200]}），认不出对话在哪里。{ARRAY}")
        for key in [key for key in inner if key != wrap and wrap in TRAIN]:
            log.note(f"只读了 {wrap} 这一部分，{key[:40]} 没有读入：02 会自己留出验证集")
        value = inner[wrap or next(iter(inner))]
    return value


def _dialogues(rows: Iterator, log: Log) -> Iterator:
    """The lines of every dialogue."""
    for log.row, row in rows:
        if type(row) is dict and (plan := _plan(tuple(row))).line:
            return (yield from _chats(chain([(log.row, row)], rows), plan, log))
        if type(row) is dict and type(row.get("row")) is dict:
            if row.get("truncated_cells"):
                log.note("网页上的数据查看器截短了这一条，没有读入：请下载完整的文件", log.row)
                continue
            row = row["row"]
        more = row.pop("instances", None) if type(row) is dict else None
        for one in more if type(more) is list else [None]:
            yield _lines(row | one if type(one) is dict else row, log)


def _hours(value: Any) -> float | None:
    """When a message was sent, from 2024/1/1 12:00 and the like or seconds since 1970."""
    numbers = [int(number) for number in re.findall(r"\d{1,15}", str(value))[:6]]
    if numbers[:1] > [10**8]:
        return numbers[0] / (3_600_000 if numbers[0] > 10**11 else 3600)
    with suppress(ValueError, TypeError):  # no date, or one whose order is not certain
        if not re.search("[ap]m|[上下]午", str(value), re.I):
            return (datetime(*numbers) - datetime(1970, 1, 1)).total_seconds() / 3600


def _chats(rows: Iterator, plan: SimpleNamespace, log: Log) -> Iterator[list]:
    """The conversations of rows that are one message each; {} is the border of a scene."""
    who, room, talks, last = plan.her or plan.who, None, {}, {}
    role_of = dict.fromkeys(("1", "true"), HER).get if plan.her else _role
    names = 1 if plan.her else f"{NAME}（或 assistant）"
    log.note(f"每{log.unit}是一句话：{who} 是 {names} 的是回答，之前的是问题")
    for log.row, row in rows:
        row = row if type(row) is dict else {}
        role = role_of(_word(row.get(who))) or "user"
        # Where no column names the room, whoever else speaks does.
        here = row.get((plan.her and plan.room) or plan.scene)
        here = here or (row.get(plan.who) if plan.her and role != HER else room)
        room, before = _word(here), room
        if not row or not (plan.her or room == before):  # rooms may take turns, scenes do not
            yield from talks.values()
            talks, last = {}, {}
        now, then = _hours(row.get(plan.time)), last.get(room)
        if now and then and now < then - 0.1:
            log.stop("时间是倒着的：请按时间从早到晚排好，再导出。", log.row, plan.time)
        if now and then and now > then + SILENCE and room in talks:
            log.note(f"隔了 {SILENCE} 小时以上没有说话，之后算另一段对话", log.row)
            yield talks.pop(room)
        last[room], text = now or then, row.get(plan.said)
        if _word(row.get(plan.type, "")) not in PLAIN or (type(text) is str and _no_words(text)):
            log.note("不是文字的消息没有读入", log.row)
        elif row and text != "":
            talks.setdefault(room, []).append((log.row, role, text, plan.said, True))
    yield from talks.values()


def _lines(value: Any, log: Log, role="user", place="", learn=True) -> Iterator[tuple]:
    """(row, role, text, place, learn) of all that a row, a list of turns, a turn or a text says."""
    # An input has the role "input". `learn` is False for a bad answer, None out of a `history`.
    if type(value) is list:
        if len(value) == 2 and _word(value[0]) in ROLES:
            role, *value = value
        for turn, one in enumerate(value):
            who = role if turn % 2 == 0 or type(one) is list else HER
            yield from _lines(one, log, who, place or "对话", learn)
        return
    if type(value) is not dict:
        if not place:
            log.stop(f"这一条应当是 {EXAMPLE}。", log.row)
        yield log.row, role, value, place, learn
        return
    plan = _plan(tuple(value))
    bad = [key for key in plan.flags if _word(value[key]) in BAD]
    if plan.rejected and (value[plan.rejected] is True or not (plan.output or plan.turns)):
        bad = [plan.rejected]
    for key in bad[:1]:
        log.note(f"标着 {key}: {_word(value[key])[:40]} 的是不好的回答，没有读入", log.row)
        learn = False
    if plan.missing and not (place or bad):
        log.stop(plan.fault, log.row, plan.missing)
    if plan.missing:  # who speaks is the name of the field; or nothing says so, and they take turns
        named = [key for key in value if key.lower() in ROLES]
        if plan.said and not named:
            yield from _lines(value[plan.said], log, role, place, learn)
        else:
            for key in (named or value) if place else ():
                yield log.row, _word(key), value[key], place, learn
        return
    unread = plan.rest + [key for key in plan.flags if _word(value[key]) not in BAD | GOOD]
    notes = {f"字段 {key[:40]} 课程用不到，没有读入": True for key in unread}
    notes |= {SYSTEM: value.get(plan.system), plan.renamed: plan.renamed and not place}
    notes["rejected 是不好的回答，没有读入"] = value.get(plan.rejected) and not bad
    for note in [note for note, holds in notes.items() if holds]:
        log.note(note, log.row)
    for key in (plan.history, plan.turns):
        if key and type(value[key]) is not list and value[key] not in (None, "", "[]"):
            log.stop("应当是一个数组，一问一答轮流写；CSV 放不下，用 JSON。", log.row, key)
    if type(past := value.get(plan.history)) is list:
        words = [ROLES.get(_word(one[0])) for one in past if type(one) is list and len(one) == 2]
        if len(words) == len(past) and any(words) and (None in words or {*words} == {HER}):
            past = [{"user": ask, HER: answer} for ask, answer in past]  # who asks “AI” is no AI
        past = [*_lines(past, log, "user", plan.history, None)]
        roles = [_role(line[1]) or "user" for line in past]
        roles = [role for role in roles if role not in ("system", "input")]
        if roles != ["user", HER] * (len(roles) // 2):
            log.note("history 里的话不是一问一答，没有读入", log.row)
        elif any(line[2] for line in past):
            log.note("带着前文（history），每个回答各成一条", log.row)
            yield from past
    if plan.line:
        yield log.row, _word(value.get(plan.who)), value[plan.said], place, learn
    if plan.turns:
        yield from _lines(value[plan.turns] or [], log, "user", plan.turns, learn)
    ask, answer = value.get(plan.instruction), value.get(plan.output)
    if type(ask) is type(answer) is list and ask and len(ask) == len(answer):
        ask, answer = [text for pair in zip(ask, answer, strict=True) for text in pair], []
    answered = [*_lines(answer, log, HER, place or plan.output, learn)] if plan.output else []
    if len(answered) > 1 and all(_role(line[1]) == HER for line in answered):  # to choose from
        log.stop(NOT_TEXT, log.row, place or plan.output)
    if plan.instruction and not any(_role(line[1]) == "user" for line in answered):
        asked = [*_lines(ask, log, "user", place or plan.instruction, learn)]
        if asked and answered and _role(asked[-1][1]) == HER:
            log.stop("一问一答轮流写，问的要比答的多一句。", log.row, plan.instruction)
        if plan.input:
            yield log.row, "input", value[plan.input], place or plan.input, learn
        yield from asked
    yield from answered


def _checked(log: Log, number: int, role: str, text: Any, place: str, learn: Any) -> str:
    """The text of a line, which must be one, and be printable."""
    if type(text) is list:
        with suppress(TypeError, KeyError):  # no parts of a content, or a picture among them
            text = "".join(part["text"] for part in text)
    if type(text) is not str:
        log.stop(NOT_TEXT, number, place)
    if bad := UNFIT.search(text):
        log.stop(f"第 {bad.start() + 1} 个字符是 U+{ord(bad[0]):04X}{UNFIT_IS}", number, place)
    return text


def _turns(lines: list[tuple], log: Log) -> Iterator[tuple]:
    """(number, question, input, answer, learn) of each answer, out of all the lines before it."""
    others = "user" if any(line[1] in HERS for line in lines) else None  # people of a play
    asked, given = None, ""
    for role, group in groupby(lines, lambda line: _role(line[1]) or others):
        group = [*group]  # one text: several may speak before she does
        number, name, _, place, learn = group[0]
        text = "\n".join([_checked(log, *line) for line in group])
        if role == "system":
            log.note(SYSTEM, number)
        elif role == "input":
            given = text
        elif not role:
            log.stop(f"角色 {name!s:.20} 不认识：她是 assistant，别人是 user。", number, place)
        elif not (text.strip() or (role == "user" and given.strip())):
            log.stop("是空的，请写上问她的话和她的回答。", number, place)
        elif role == "user":
            asked = text
        elif asked is not None:
            yield number, asked, given, text, learn
            asked, given = None, ""
        else:
            log.note("她先开口，前面没有人说话，没有读入", number)
    if asked is not None:
        log.note("最后几句她没有回答，没有读入", group[-1][0])


def _collected(dialogues: Iterator, log: Log) -> tuple:
    """The rows, their numbers, whether a `history` held them, and how often placeholders occur."""
    rows, numbers, past = [], [], []
    holds, marks, marked = Counter(), Counter(), 0
    for lines in dialogues:
        said: list[list[str]] = []
        try:
            turns = [*_turns([*lines], log)]
        except DatasetError as error:  # of this dialogue; there may be more to mend
            log.problem(*error.problems[0])
            continue
        for number, ask, given, answer, learn in turns:
            both = "\n".join((ask, given, answer))
            if learn is not False:
                rows.append((ask, given, answer, said[-TURNS:]))
                numbers.append(number)
                past.append(learn is None)
                if ask and given:
                    log.note("instruction 和 input 都有内容，在提示里用一个换行接起来", number)
                if _odd(both):
                    for mark in dict.fromkeys(_TO_FILL.findall(both)):
                        log.note(PLACEHOLDER.format(mark), number)
                        holds[mark] += 1
                    found = [*dict.fromkeys(map(str.strip, _MARK.findall(both)))]
                    marks.update(found)
                    marked += bool(found)
            said.append([f"{ask}\n{given}" if ask and given else ask or given, answer])
        if len(said) > 1 and turns[0][-1] is not None:  # of a history _lines has spoken
            log.note(EARLIER, number)
        elif not turns:
            log.note("没有成对的一问一答，没有读入", log.row)
    if marked * 2 > len(rows):
        seen = "、".join(f"{mark}（{count} 条）" for mark, count in marks.most_common(NAMED))
        held = f"{len(rows)} 条里有 {marked} 条带着别的格式的记号：{seen}"
        log.note(f"{held}。照原样读入，她会当成话来学：请先在文件里删掉")
    return rows, numbers, past, dict(holds)
