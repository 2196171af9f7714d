"""The one prompt, of any chat model. Training and asking build their tokens here, so they cannot differ.

Nothing here belongs to one family of models: what stands around the texts, how a turn ends and
what fills a batch are read from the model's own tokenizer and chat template.
"""

import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise

from huanhuan import CourseError
from huanhuan.persona import SYSTEM_PROMPT

# Some templates write today's date into every prompt, by `date_string` or by a clock of their own.
# A fixed date keeps tomorrow's prompt equal to the one the model was trained with.
DATE_STRING = "26 Jul 2024"
_DATE = datetime.strptime(DATE_STRING, "%d %b %Y")
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

# Private-use characters, one a text: they stand where it goes while the template is rendered.
_SLOTS = [chr(0xE000 + place) for place in range(6000)]
_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>(?!.*</\1>)", re.S)


def chat_messages(question: str, tokenizer=None) -> list[dict[str, str]]:
    """The conversation sent to the model: the persona's system prompt, then the question.

    Some templates have no place for a system prompt. With such a `tokenizer` it stands at the head
    of the question, as the authors of those templates advise (Gemma's model card).
    """
    return _messages([question], SYSTEM_PROMPT, tokenizer)


def _messages(texts: Sequence[str], system: str | None, tokenizer=None) -> list[dict[str, str]]:
    """Question, answer, question … as messages, after the system prompt where there is one."""
    head = [{"role": "system", "content": system}] if system is not None else []
    if (
        head
        and tokenizer is not None
        and not _takes_system(tokenizer, tokenizer.get_chat_template())
    ):
        head, texts = [], [f"{system}\n\n{texts[0]}", *texts[1:]]
    turns = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(texts)
    ]
    return head + turns


def template_options(tokenizer) -> dict:
    """What the course tells `tokenizer.apply_chat_template`: the date of the training, and no thinking."""
    fixed = _CLOCK.sub(
        lambda call: json.dumps(_DATE.strftime(call[2])), tokenizer.get_chat_template()
    )
    return {"chat_template": fixed, "date_string": DATE_STRING, "enable_thinking": False}


def fixed_template(tokenizer) -> str:
    """The chat template with :func:`template_options` written into it, for engines that are not told."""
    options = template_options(tokenizer)
    template = options.pop("chat_template")
    for name, value in options.items():
        told = f"{{% set {name} = {json.dumps(value)} %}}"
        if name in template and told not in template:
            template = told + template
    return template


def _rendered(tokenizer, messages: list[dict[str, str]]) -> str:
    """The template's text; after a question also what it writes before the answer."""
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] == "user",
        **template_options(tokenizer),
    )


@lru_cache(maxsize=64)
def _takes_system(tokenizer, template) -> bool:
    """Whether the template has a place for the system prompt. `template`: part of the cache's key."""
    try:
        rendered = _rendered(tokenizer, _messages(_SLOTS[1:2], _SLOTS[0]))
        return all(rendered.count(slot) == 1 for slot in _SLOTS[:2])
    except Exception:  # a template is a program, and may fail in any way
        return False


@lru_cache(maxsize=64)
def _frame(tokenizer, template, texts: int, system: bool) -> tuple[list[str], list[int]]:
    """What the template writes around that many texts (question, answer …), and their order in it.

    With `system` one text more, before the others; some templates put it into the last question.
    """
    slots = _SLOTS[: texts + system]
    messages = _messages(slots[system:], slots[0] if system else None)
    pieces = re.split(f"([{slots[0]}-{slots[-1]}])", _rendered(tokenizer, messages))
    return pieces[::2], [slots.index(slot) for slot in pieces[1::2]]


def frame(tokenizer, texts: int, system: bool = True) -> list[str]:
    """The pieces of text that the template writes before, between and after so many texts.

    The texts are a question, its answer, the next question …, and before them the system prompt,
    unless `system` is False. One piece more than there are texts.
    """
    return list(_frame(tokenizer, tokenizer.get_chat_template(), texts, system)[0])


@lru_cache(maxsize=8)
def _control(tokenizer) -> frozenset[int]:
    """Ids of the tokens that stand for no text: marks of turns, of thinking, of tools, padding …

    Runs of blanks, which some vocabularies list beside them, are text.
    """
    added = tokenizer.added_tokens_decoder
    return frozenset(i for i, token in added.items() if token.content.strip(" \t\r\n▁"))


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of plain text without blanks at its ends, and without BOS.

    The text is content, never control: a mark such as the one that ends a turn, typed by a person,
    becomes ordinary characters.
    """
    text, control = text.strip(), _control(tokenizer)
    ids = _encode(tokenizer, text)
    typed = control.intersection(ids)
    if not typed:
        return ids
    # Cut within every mark, and encode the parts one by one.
    starts = set()
    for mark in tokenizer.convert_ids_to_tokens(sorted(control)):
        place = text.find(mark)
        while place >= 0:
            starts.add(place + 1)
            place = text.find(mark, place + 1)
    ends = [0, *sorted(starts), len(text)]
    parts = [text[a:b] for a, b in pairwise(ends)]
    ids = [i for part in parts for i in _encode(tokenizer, part)]
    if control.intersection(ids):  # a mark that the tokenizer sees where it is written otherwise
        ids = [i for character in text for i in _encode(tokenizer, character)]
    return ids


def prompt_ids(
    tokenizer,
    question: str,
    turns: Sequence[tuple[str, str]] = (),
    system: str | None = SYSTEM_PROMPT,
) -> list[int]:
    """Token ids of the whole prompt, up to where the model answers; as its own template renders it.

    `turns` are the questions and answers that went before. `system` None: without the persona, as a
    model is asked that nobody told who it is. Texts lose the blanks at their ends. What a person
    types stays text (:func:`text_ids`).
    """
    texts = [text.strip() for turn in turns for text in turn] + [question.strip()]
    template = tokenizer.get_chat_template()
    if system is not None:
        if _takes_system(tokenizer, template):
            texts = [system.strip(), *texts]
        else:
            texts[0], system = f"{system.strip()}\n\n{texts[0]}".strip(), None
    pieces, order = _frame(tokenizer, template, 2 * len(turns) + 1, system is not None)
    texts = [texts[place] for place in order]
    whole = pieces[0] + "".join(text + after for text, after in zip(texts, pieces[1:], strict=True))
    ids, control = _encode(tokenizer, whole), _control(tokenizer)
    expected = [i for i in _encode(tokenizer, "".join(pieces)) if i in control]
    if [i for i in ids if i in control] == expected:
        return ids
    ids = _encode(tokenizer, pieces[0])
    for text, after in zip(texts, pieces[1:], strict=True):
        ids += text_ids(tokenizer, text) + _encode(tokenizer, after)
    return ids


def question_of(row) -> str:
    """What is said in a dataset's row: its `instruction` and, on the next line, its `input`."""
    return "\n".join(text for text in (row["instruction"], row["input"]) if text.strip())


def normalised(instruction: str) -> str:
    """`instruction` as it is compared: without punctuation, spaces, and differences of width and case."""
    folded = unicodedata.normalize("NFKC", instruction).casefold()
    return re.sub(r"[\W_]+", "", folded) or instruction.strip()


def shorten(tokenizer, question: str, max_tokens: int) -> str:
    """Cut the middle out of a question until its prompt fits into `max_tokens` tokens.

    The beginning and the end stay, joined by ``……``; the template around the question is never
    cut. A question that fits comes back as it is. Where not even an empty question fits, the
    result is empty and the prompt is longer than `max_tokens`.
    """
    if len(prompt_ids(tokenizer, question)) <= max_tokens:
        return question
    question = question.strip()
    fits, too_long = -1, len(question)  # characters kept; -1: not even the mark fits
    while too_long - fits > 1:
        keep = (fits + too_long) // 2
        cut = question[: (keep + 1) // 2] + "……" + question[len(question) - keep // 2 :]
        if len(prompt_ids(tokenizer, cut)) <= max_tokens:
            fits, best = keep, cut
        else:
            too_long = keep
    return best if fits >= 0 else ""


def fit(
    tokenizer, question: str, turns: Sequence[tuple[str, str]], max_tokens: int
) -> tuple[str, list[tuple[str, str]]]:
    """The question and the turns before it, cut until their prompt fits into `max_tokens` tokens.

    First the oldest turns go, whole; only then the question is cut (:func:`shorten`).
    """
    turns = list(turns)
    while turns and len(prompt_ids(tokenizer, question, turns)) > max_tokens:
        turns = turns[1:]
    return question if turns else shorten(tokenizer, question, max_tokens), turns


def end_id(tokenizer) -> int:
    """The token that ends an answer: the first mark that the template writes after one.

    Some templates write none after the last answer, only before what follows; then it is that one.
    Raises CourseError where the template ends an answer with no mark.
    """
    control = _control(tokenizer)
    for texts in (2, 3):
        after = frame(tokenizer, texts, system=False)[2]
        for token in _encode(tokenizer, after):
            if token in control:
                return token
            if tokenizer.decode([token]).strip():
                break
    raise CourseError(
        "这个模型的聊天模板没有在回答后面写结束标记，训练教不会它停下来：请换一个对话（Instruct）模型。"
    )


def pad_token(tokenizer) -> str:
    """The token that fills up shorter rows: the tokenizer's own, or one that nothing else uses.

    One's own is no good where it also ends answers: it would be taught, or not, with them.
    """
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    used.add(tokenizer.convert_ids_to_tokens(end_id(tokenizer)))
    if tokenizer.pad_token and tokenizer.pad_token not in used:
        return tokenizer.pad_token
    written = "".join(frame(tokenizer, 3))
    marks = tokenizer.convert_ids_to_tokens(sorted(_control(tokenizer)))
    free = [mark for mark in marks if mark not in used and mark not in written]
    # One that says what it is for, else one that was kept in reserve, else any.
    for word in ("pad", "reserved", "unused", ""):
        for mark in free:
            if word in mark.lower():
                return mark
    return tokenizer.eos_token


# Of a model's own way of answering, what is kept.
SAMPLES = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


def end_generation(model, tokenizer) -> None:
    """See that `model` stops where an answer ends, in this run; says so where its own config does not."""
    from transformers import GenerationConfig

    config, end = model.generation_config, end_id(tokenizer)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [stop for stop in stops if type(stop) is int]
    # What it says of beams, of time and of texts to return would break the questions' order.
    said = {name: getattr(config, name, None) for name in SAMPLES}
    config = GenerationConfig(**{n: x for n, x in said.items() if isinstance(x, int | float)})
    getattr(model, "get_base_model", lambda: model)().generation_config = config
    if end not in stops:
        print(
            f"模型的 generation_config 里没有结束标记 {tokenizer.decode([end])}，这次运行加上它。"
        )
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = [*stops, *[end] * (end not in stops)]
    config.pad_token_id = tokenizer.convert_tokens_to_ids(pad_token(tokenizer))


# Renders a template in a process of its own, which may not take more than so much.
_ALONE = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
given = json.load(sys.stdin)
try:
    import resource
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 2,) * 2)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**29,) * 2)
except (ImportError, OSError):
    pass  # Windows has no such limits, macOS only that of time; there are the seconds
for messages in given.pop("conversations"):
    try:
        render_jinja_template([messages], add_generation_prompt=True, **given)
    except MemoryError:
        sys.exit(1)
    except Exception:
        pass  # what is wrong is said where it is rendered again
"""
ALONE_SECONDS = 60  # for what takes some thousandths, and a second to begin


def _check_ends(tokenizer) -> None:
    """Raises CourseError where the template takes for ever, or all the memory there is."""
    turns = _messages(["甲", "乙", "丙"], None)
    given = tokenizer.special_tokens_map | template_options(tokenizer)
    given["conversations"] = [_messages(["甲"], "丁"), turns[:1], turns]
    try:
        subprocess.run(
            [sys.executable, "-c", _ALONE], input=json.dumps(given), text=True, check=True,
            capture_output=True, timeout=ALONE_SECONDS, encoding="utf-8",
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError, TypeError, ValueError):
        raise CourseError("这个模型的聊天模板写不完一段对话：不用它，请换一个模型。") from None


def check_template(tokenizer) -> None:
    """See that the course can talk with a model through its chat template.

    Raises CourseError with what is missing: a template at all, an end to its work, an end mark, an
    answer without thinking first.
    """
    if not tokenizer.chat_template:
        raise CourseError("这是基座模型，没有聊天模板：请改用名字里带 Instruct 或 Chat 的那一个。")
    _check_ends(tokenizer)
    try:
        written = frame(tokenizer, 1, system=False)[-1]
        order = _frame(tokenizer, tokenizer.get_chat_template(), 3, False)[1]
    except Exception as error:  # a template is a program, and may fail in any way
        raise CourseError(
            f"这个模型的聊天模板用不了（{error}）：请换一个对话（Instruct）模型。"
        ) from None
    if order != [0, 1, 2]:
        raise CourseError("这个模型的聊天模板不照原样写出对话：请换一个对话（Instruct）模型。")
    if _THINKING.search(written):
        raise CourseError(
            "这个模型只会先思考再回答（聊天模板总是打开思考），课程的数据里没有思考过程："
            "请改用同一系列里不思考的版本，名字里常带 Instruct。"
        )
    end_id(tokenizer)
