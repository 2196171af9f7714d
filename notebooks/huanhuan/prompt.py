"""The persona and the one prompt. Training and asking build their tokens here, so they cannot differ."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from huanhuan.course import DATA, CourseError

# The one place that says who is played: name, system prompt, what the persona is called in its own
# answers (any of these), and the dataset, beside this file unless it is an absolute path. And, where
# it needs them, values of its own for the profile: little data wants more epochs.
PERSONA_FILE = Path(os.environ.get("HUANHUAN_PERSONA") or DATA / "persona_huanhuan.json")
_FIELDS = {"name": str, "system_prompt": str, "called": list, "dataset": str}


def read_persona(file: Path) -> dict:
    """The persona in a JSON file. Raises CourseError where it cannot be read or a field is wrong."""
    try:
        persona = json.loads(file.read_text(encoding="utf-8"))
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(persona.get(name), kind)]
    except (OSError, ValueError, AttributeError) as error:
        raise CourseError(
            f"角色文件 {file} 读不出来（{error}）：请检查 HUANHUAN_PERSONA。"
        ) from None
    if wrong:
        raise CourseError(
            f"角色文件 {file.name} 里缺少 {'、'.join(wrong)}，或者类型不对：照 data/persona_huanhuan.json 的样子写。"
        )
    return persona


PERSONA = read_persona(PERSONA_FILE)
NAME, SYSTEM_PROMPT, CALLED = PERSONA["name"], PERSONA["system_prompt"], PERSONA["called"]
SAMPLE = PERSONA_FILE.parent / PERSONA["dataset"]

# Llama 3.2's template writes today's date into every prompt unless it is told one. A fixed date
# keeps tomorrow's prompt equal to the one the model was trained with.
DATE_STRING = "26 Jul 2024"

_SLOT = "\ue000"  # a private-use character: stands where the question goes while the template is rendered


def chat_messages(question: str) -> list[dict[str, str]]:
    """The conversation sent to the model: the persona's system prompt, then the question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of plain text, trimmed as Llama 3.2's template trims it, without BOS.

    The text is content, never control: ``<|eot_id|>`` typed by a person becomes ordinary
    characters, not the token that ends a turn.
    """
    return tokenizer.encode(text.strip(), add_special_tokens=False, split_special_tokens=True)


def prompt_ids(tokenizer, question: str, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Token ids of the whole prompt, from BOS to the header after which the model answers.

    `turns` are the questions and answers that went before. The tokenizer's own chat template
    renders everything around the texts; the texts themselves go through :func:`text_ids`.
    """
    messages = chat_messages(_SLOT)
    for _ in turns:
        messages += [{"role": "assistant", "content": _SLOT}, {"role": "user", "content": _SLOT}]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=DATE_STRING
    )
    between = rendered.split(_SLOT)
    ids = tokenizer.encode(between[0], add_special_tokens=False)
    texts = [text for turn in turns for text in turn] + [question]
    for text, after in zip(texts, between[1:], strict=True):
        ids += text_ids(tokenizer, text) + tokenizer.encode(after, add_special_tokens=False)
    return ids


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
