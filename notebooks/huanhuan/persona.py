"""Who is played: the persona file, what only its data tells, and the questions of the exam."""

import os
import unicodedata
from pathlib import Path

from huanhuan import DATA, CourseError, read_json

# The one place that says who is played: name, system prompt, what the persona is called in its own
# answers (any of these), and the dataset, beside this file unless it is an absolute path. Where there
# are any: facts that only the dataset tells, questions of its own, and values for the profile (little
# data wants more epochs).
PERSONA_FILE = Path(os.environ.get("HUANHUAN_PERSONA") or DATA / "persona_huanhuan.json")
_TEXTS = "heldout_questions.json"
_FIELDS = {"name": str, "system_prompt": str, "called": list, "dataset": str}
_OPTIONAL = {"facts": list, "questions": str, "profile": dict}
_FACT = '{"ask": ["没训练过的问法", …], "expected": ["答案里该有的词", …]}'


def read_persona(file: Path) -> dict:
    """The persona in a JSON file. Raises CourseError where it cannot be read or a field is wrong."""
    try:
        persona = read_json(file)
    except (OSError, ValueError) as error:
        raise CourseError(
            f"角色文件 {file} 读不出来（{error}）：请检查 HUANHUAN_PERSONA。"
        ) from None
    kinds = _FIELDS | {name: kind for name, kind in _OPTIONAL.items() if name in persona}
    wrong = [name for name, kind in kinds.items() if not isinstance(persona.get(name), kind)]
    wrong += [n for n, kind in kinds.items() if kind is str and not _is_text(persona.get(n))]
    wrong += ["called"] * (not _are_texts(persona.get("called")))
    if wrong:
        raise CourseError(
            f"角色文件 {file.name} 里缺少 {'、'.join(dict.fromkeys(wrong))}，或者类型不对：照 data/persona_huanhuan.json 的样子写。"
        )
    for number, fact in enumerate(persona.get("facts", []), 1):
        lists = [fact.get(part) for part in ("ask", "expected")] if isinstance(fact, dict) else [0]
        if not all(map(_are_texts, lists)):
            raise CourseError(
                f"角色文件 {file.name} 的 facts 第 {number} 项应当是 {_FACT}，请照着改。"
            )
    return persona


def _is_text(value) -> bool:
    """Something to read, with no control character and no half of an emoji in it."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t" for c in value)


def _are_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def read_questions(file: Path) -> dict:
    """The questions of the exam: ``known`` (trained on), ``identity``, ``daily`` (lists of texts) and
    ``general``: ordinary knowledge, ``{question: (words of which a right answer holds one, words that
    only a wrong one holds)}``, in the file ``[{"question", "expected", "wrong"}]``. Raises CourseError.
    """
    try:
        questions = read_json(file)
        lists = {name: questions[name] for name in ("known", "identity", "daily")}
        general = {
            one["question"]: (one["expected"], one.get("wrong", [])) for one in questions["general"]
        }
        needed = [lists["known"], *(expected for expected, _ in general.values())]
        others = [lists["identity"], lists["daily"], [*general], *(x for _, x in general.values())]
        if not all(map(_are_texts, needed + [texts for texts in others if texts != []])):
            raise ValueError("应当是文字的数组，known 和 expected 不能是空的")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CourseError(
            f"考题文件 {file} 读不出来（{error}）：照 data/{_TEXTS} 的样子写。"
        ) from None
    return lists | {"general": general}


PERSONA = read_persona(PERSONA_FILE)
NAME, SYSTEM_PROMPT, CALLED = PERSONA["name"], PERSONA["system_prompt"], PERSONA["called"]
FACTS = PERSONA.get("facts", [])
SAMPLE = PERSONA_FILE.parent / PERSONA["dataset"]
QUESTIONS = read_questions(
    PERSONA_FILE.parent / PERSONA["questions"] if "questions" in PERSONA else DATA / _TEXTS
)
WHO = QUESTIONS["known"][0]  # the question that everybody asks first, and that was trained on
