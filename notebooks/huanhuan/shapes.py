"""What the rows of the files of this world mean: the table of shapes, and the turns behind each."""

import ast
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pandas as pd

from huanhuan.persona import CALLED, NAME

FIELDS = ("instruction", "input", "output")
NAMED = 10  # names, or row numbers, in a sentence; the rest are counted
EXAMPLE = '{"instruction": "…", "input": "", "output": "…"}'
NOTHING = '请写上文字；input 没有内容就写 ""。'
LINES = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
UNFIT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
SILENCE = 3 * 3600  # ends a conversation in a chat export

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
    "room": "room_name roomname talkerid strtalker talker nickname remark",
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
TO_PAIRS = (
    f"请整理成一问一答，存成 JSON，每条 {EXAMPLE}，或者存成有 instruction,output 两列的 CSV。"
)
TEXTS = (  # how text that is no data begins
    # The first three are never a script, the next two are one where she speaks.
    (r"version https://git-lfs", "Git LFS 的占位文件", "请下载原始文件。"),
    (r"\s*<[!?A-Za-z]", "网页（HTML）", "可能把网页当数据存下来了，请重新下载原始文件。"),
    (r"WEBVTT|\d+\s*\n\d\d:\d\d:\d\d", "字幕", f"请去掉时间，写成“名字：台词”，{NAME} 的台词以“{NAME}：”开头。"),
    (r"---|- |[a-z_]+:\s", "YAML 或配置", f"请用 yaml.safe_load 读出来，再用 json.dump 存成 JSON，每条 {EXAMPLE}。"),
    (r"#+ |\||```|[*>] |!?\[.*\]\(", "Markdown", TO_PAIRS),
    (r"", "文章、小说或剧本", f"{TO_PAIRS}剧本请写成“名字：台词”，每句一行，{NAME} 的台词以“{NAME}：”开头。"),
)  # fmt: skip
_SCENE = re.compile(
    r"\s*(?:第[\d一二三四五六七八九十百零〇 ]{1,6}[场幕集回章节]|(?:场景|时间|地点)\s*[：:]|(?:INT|EXT)\.|[-*=—]{3,}$)"
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
odd = re.compile(r"[\[{<【%#>]|END|STOP|Human:|Assistant:|User:|[问答][:：]").search


class _Wrong(Exception):
    """(field, message): what is wrong with a row, said where it is found."""


def plan_of(row: dict) -> SimpleNamespace:
    return shape(tuple(row))


@lru_cache(maxsize=1000)  # nearly all rows of a file have the same keys
def shape(keys: tuple[str, ...]) -> SimpleNamespace:
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
    if found["room"] == found["who"]:
        found["room"] = None
    sides = ("instruction", "output")
    pair = {part: [lower[name] for name in SHAPES[part][0] if name in lower] for part in sides}
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
        there = "、".join(map(short, rest[:NAMED]))
        if found[part] or part in missing or (part == "input" and not like):
            continue
        if like:
            there = f"是名字写得不一样吗？{short(lower[like[0]])} → {part}？请改名"
        elif rest:
            there = f"这里有的是 {there}：是其中哪一个，请把它改名为 {part}"
            there += "；问和答连在一段里的，请先拆开"
        missing[part] = f"缺少这个字段，{there or '请补上'}。"
    moved = [part for part in FIELDS if found[part] and found[part] != part]
    renamed = f"字段 {'、'.join(found[p] for p in moved)} 换成了 {'、'.join(moved)}" * bool(moved)
    sides = {found[part] for part in FIELDS} - {None}
    plain = not (missing or flags or rest or found["turns"]) and sides == {*row}
    found |= {"plain": plain, "flags": flags, "rest": rest, "renamed": renamed}
    return SimpleNamespace(**found, missing=[*missing.items()])


def short(name: Any) -> str:
    return str(name)[:40] or "（没有名字）"


def _flag(value: Any) -> str:
    return str(value).strip().lower()


def _bad(row: dict, plan: SimpleNamespace) -> str:
    """What in a row or turn says that its answer is a bad one, "" where nothing does."""
    for key in plan.flags:
        if (word := _flag(row[key])) in BAD or (word in FALSE and key.lower() in FLAGS):
            return f"{short(key)}: {word}"
    alone = plan.rejected and not (plan.output or plan.turns)
    return "rejected" if alone or (plan.rejected and row[plan.rejected] is True) else ""


def unwrapped(value: Any, log) -> list:
    """The rows within the outermost value of a JSON file, which is no array."""
    while type(value) is dict and value:
        value.pop(None, None)
        inner = {key: part for key, part in value.items() if type(part) in (list, dict) and part}
        train = next((key for key in inner if key.lower() in TRAIN), None)
        wraps = [key for key in inner if key.lower() in WRAPS] or [*inner]
        plan = plan_of(value)
        try:  # written by pandas, column by column
            if {"columns", "data"} <= inner.keys():
                names = [*map(str, inner["columns"])]
                return pd.DataFrame(inner["data"], columns=names, dtype=object).to_dict("records")
            cells = [inner.get(plan.instruction), inner.get(plan.output)]
            if all(cells) and not any(map(_who, cells)):
                return pd.DataFrame(inner, dtype=object).fillna("").to_dict("records")
        except (ValueError, TypeError):
            log.stop(
                '内容是按列写的，可是各列不一样长，或者缺了格子：请用 orient="records" 重新导出。'
            )
        if train:
            for key in inner.keys() - {train}:
                log.note(f"只读了 {train} 这一部分，{short(key)} 没有读入：02 会自己留出验证集")
            value = inner[train]
        elif _is_row(value):
            return [value]
        elif inner and all(map(_is_row, value.values())):  # orient="index", or rows that have names
            return [*value.values()]
        elif len(wraps) != 1:
            there = "、".join(map(short, value))
            log.stop(
                f"最外层是单独一个对象，里面是 {there}，认不出对话在哪里：请只留下对话的数组 [{EXAMPLE}, …]。"
            )
        else:
            value = inner[wraps[0]]
    if type(value) is not list:
        log.stop(f"最外层是{what_is(value)[0]}，应当是一个数组：[{EXAMPLE}, {EXAMPLE}]。")
    return value


def _is_row(value: Any) -> bool:
    """Whether this is one row, or the turns of one dialogue, and not what holds rows."""
    if type(value) is list:
        one = value[0] if value else None
        sides = {key.lower() for key in one} & ROLES.keys() if type(one) is dict else set()
        return type(one) is str or bool(sides - {"system"}) or bool(_who(one))
    if type(value) is not dict:
        return False
    value = next((value[key] for key in INNER if type(value.get(key)) is dict), value)
    plan = plan_of(value)
    cells = [value.get(name) for name in (plan.instruction, plan.output)]
    turns = value.get(plan.turns)
    return {str, list} >= {*map(type, cells)} or (type(turns) is list and _is_row(turns))


def expanded(row: Any, number: int, log) -> Iterator[Any]:
    """The row within a row, or all rows within it, or one for each of several answers."""
    if type(row) is not dict:
        return (yield row)
    plan = plan_of(row)
    half = not (plan.instruction and plan.output)
    if half and (inner := next((row[key] for key in INNER if type(row.get(key)) is dict), None)):
        if row.get("truncated_cells"):
            log.problem(number, "", "网页把这一条截短了（truncated_cells），请下载原始文件。")
        row, plan = inner, plan_of(inner)
    for name in SEVERAL if half else ():
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


def turns_of(row: Any, number: int, log) -> list[tuple]:
    """Check one row: its turns. All its faults are reported, of a dialogue the first."""
    turns, lines, missing, asked, given, field, where = [], [], [], None, "", "", ""
    if type(row) is dict:
        for key in row.pop(None, ()):
            log.problem(number, key, "这个字段写了不止一次，请只留一个。")
        plan = plan_of(row)
        if plan.plain:  # nearly all rows of this world: no need to go the long way
            texts = (row[plan.instruction], row[plan.input] if plan.input else "", row[plan.output])
            clean = all(type(text) is str and not UNFIT.search(text) for text in texts)
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
            raise _Wrong("", f"这一条应当是 {EXAMPLE}，这里却是{what_is(row)[0]}。")
        spoken = list(_said(row, "", "", "user", number, log))
    except _Wrong as wrong:
        log.problem(number, *wrong.args)
        return []
    except RecursionError:
        log.problem(number, "", f"括号套得太深了，一条对话应当是 {EXAMPLE}。")
        return []
    named = any(type(who) is str and who.strip().lower() in HERS for who, *_ in spoken)
    for who, content, own, field, where in spoken:
        text, role = _text(content), ROLES.get(_flag(who))
        if named and role != "system":  # people of a play: several may speak before she does
            role = "assistant" if _flag(who) in HERS else "user"
        expected = "user" if asked is None else "assistant"
        fault = _fault(text) and "的内容" * bool(where) + _fault(text)
        if role == "system":
            log.note(SYSTEM, number)
            continue
        if who is None:
            given = given if fault else text
        elif role is None:
            said = short(who) if type(who) is str else what_is(who)[0]
            fault = f"的角色不认识：{said}。请改成其中之一：{'、'.join(ROLES)}。"
        elif role != expected and not named and not missing:
            fault = f"是 {who} 说的，这里应当轮到 {expected}："
            fault += "请补上缺的那句，或把相连的两句并成一句。"
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
        return [turn for made in conversations(lines, log) for turn in made]
    if asked is not None or not turns:
        fault = "最后一句应当是 assistant 的回答：请补上回答，或删掉没有回答的那句。"
        log.problem(number, field or (plan.turns if type(row) is dict else ""), fault)
        return []
    if where:
        field = f"{field} " if field else "数组"
        log.note(f"{field}里的一问一答换成了 instruction、output", number)
    return turns


def _said(
    value: Any, field: str, where: str, role: str, number: int, log
) -> Iterator[tuple[Any, Any, bool | None, str, str]]:
    """(who, content, own, field, place) of all that a row, a turn or a list of turns says.

    An input has None for who; `own` is False where the answer is not to be learnt, None where it is
    out of a `history`.
    """
    if type(value) is list and len(value) == 2 and _flag(value[0]) in ROLES:
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
        raise _Wrong(field, f"{where}应当是{what}，这里却是{what_is(value)[0]}。")
    else:
        yield from _spoken(value, field, where, number, log)


def _spoken(value: dict, field: str, where: str, number: int, log) -> Iterator[tuple]:
    """The same of a row or turn that is an object."""
    if repeated := value.pop(None, None):
        raise _Wrong(field, f"{where}的字段 {short(repeated[0])} 写了不止一次，请只留一个。")
    plan, own = plan_of(value), True
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
        turns = [*_said(_parsed(value[plan.history]), "history", "", "user", number, log)]
        if sum(ROLES.get(_flag(turn[0])) != "system" for turn in turns) % 2:
            raise _Wrong(
                "history", "里面应当是一问一答 [[问, 答], …]，这里有一句没有配对，请补上或删掉。"
            )
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
        there = "、".join(map(short, value))
        fault = f'应当写明谁说的：{{"role": "user", "content": "…"}}，这里有的是 {there}。'
        raise _Wrong(field, where + fault)


def _who(value: Any) -> str:
    """Who speaks in a turn, or in the first of several; "" where this is no turn."""
    value = value[0] if type(value) is list and value else value
    plan = plan_of(value) if type(value) is dict else None
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
        return "应当是一段文字，这里却是{}，{}".format(*what_is(value))
    bad = UNFIT.search(value)
    if not bad:
        return ""
    what = "看不见的控制字符 {}，请删掉"
    if bad[0] == "\ufffd":
        what = "乱码 {}，原来的字已经丢了，请对照原文改正"
    elif bad[0] >= "\ud800":
        what = "半个字符 {}（多半是表情符号断开了），请重新输入"
    return f"第 {bad.start() + 1} 个字符是{what.format(f'U+{ord(bad[0]):04X}')}。"


def what_is(value: Any) -> tuple[str, str]:
    """What a JSON value is, and what to write in its place."""
    if value is None:
        return " null（空）", NOTHING
    if type(value) is list:
        return "一个数组 [ ]", "请合成一段文字，换行写作 \\n；有几个回答的，只留好的那个。"
    if type(value) is dict:
        return "一个对象 { }", "请去掉花括号，只留一段文字。"
    if type(value) is str:
        return "一段文字", ""
    written = str(value)[:40]
    written = written.lower() if type(value) is bool else written
    return f" {written}", f'请加上引号，写成 "{written}"，或换成文字。'


def script(text: str, log) -> list[tuple[int, dict | None]]:
    """The lines of a script as rows, None for the border of a scene."""
    gaps = re.search(r"\S[ \t]*\r?\n[ \t]*\S", text)  # else an empty line follows every line
    lines, others, log.unit = [], [], "行"
    for number, match in enumerate(LINES.finditer(text), 1):
        line = match[0].strip()
        if _SCENE.match(line) or (gaps and not line):
            lines.append((number, None))
        elif speech := _SPEECH.fullmatch(line):
            lines.append((number, {"role": speech[1].strip(" *"), "content": speech[2]}))
        elif line:
            others.append(number)
    kind = next(kind for kind, (begins, *_) in enumerate(TEXTS) if re.match(begins, text))
    spoken = [row["role"] for _, row in lines if row]
    hers = any(_is_her(name) for name in spoken)
    if len(spoken) < max(2, len(others)) or kind < 3 or (kind < 5 and not hers):
        _, what, remedy = TEXTS[kind]
        log.stop(f"这是一篇文字，不是一问一答的数据。看起来是 {what}：{remedy}")
    for number in others:
        log.note("没有“名字：”的是说明，没有读入", number)
    return lines


def messages(
    rows: Iterable[tuple[int, Any]], plan: SimpleNamespace, log
) -> Iterator[tuple[int, bool | None, str]]:
    """(number, whether she says it, text) of rows that are one message each; for a border None."""
    who, names, last, room = plan.her or plan.who, {}, None, None
    said = f"（{who}）" * (log.unit == "条")  # the column; a script has none
    log.note(f"每{log.unit}是一句话：她{said}说的是回答，之前别人说的是问题")
    for number, row in rows:
        if type(row) is not dict or who not in row:
            if row is not None or log.unit == "条":  # in a script None is the border of a scene
                log.problem(number, who, "这一条没有写谁说的，请补上或删掉。")
            yield number, None, ""
            continue
        name, text = _flag(row[who]), _text(row.get(plan.said))
        hers = name in GOOD if plan.her else _is_her(name)
        names[str(row[who])] = hers
        # In some exports the talker is whoever speaks: then only the others tell one chat from another.
        place = row.get(plan.room) or (room if hers or not plan.her else row.get(plan.who))
        when, system = _time(row.get(plan.time)), ROLES.get(name) == "system"
        if system or (room and place != room) or (last and when - last > SILENCE):
            yield number, None, ""
        room, last = place, when if when == when else last
        if _flag(row.get(plan.type, "")) not in PLAIN:
            log.note("不是文字的消息没有读入", number)
        elif fault := _fault(text):
            log.problem(number, plan.said, fault)
        elif text.strip() and not system:
            yield number, hers, text
    if not any(names.values()) and not log.count:
        what = ("每条是一句话", "这是一篇文字")[log.unit == "行"] + "，不是一问一答的数据。"
        named = "、".join(map(short, [*names][:NAMED]))
        if plan.her:
            log.stop(
                f"{what}{who} 里没有一个 1，分不出哪些话是她说的：请把她说的改成 1，别人的 0。"
            )
        log.stop(
            f"{what}开口的{said}有 {named}，没有 {NAME}：请把她的名字改写成 {NAME}，或换成她的角色文件"
            f"（环境变量 HUANHUAN_PERSONA），或者整理成一问一答，每条 {EXAMPLE}。"
        )


def _is_her(name: str) -> bool:
    return _flag(name) in HERS or ROLES.get(_flag(name)) == "assistant"


def _time(value: Any) -> float:
    """The seconds of a message's time (since 1970, or year, month, day, hour …), NaN where it has none."""
    parts = re.findall(r"\d+", str(value))
    try:
        if len(parts) > 2:
            return datetime(*map(int, parts[:6])).timestamp()
        return float(parts[0]) / (1000 if len(parts[0]) > 11 else 1)
    except (ValueError, IndexError, OverflowError):
        return math.nan


def conversations(lines: Iterable[tuple[int, bool | None, str]], log) -> Iterator[list[tuple]]:
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


def oddities(texts: tuple[str, ...], number: int, log) -> set[str]:
    """Note the placeholders in a row; returns the marks of other formats."""
    for mark in {mark for text in texts for mark in _PLACEHOLDER.findall(text)}:
        log.placeholder(mark, number)
    return {mark.strip() for text in texts for mark in _MARK.findall(text)}
