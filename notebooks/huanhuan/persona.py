"""Who is played: the persona file, what only its data tells, and the questions of the exam."""

import json
import os
from pathlib import Path

from huanhuan import DATA, CourseError

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
        persona = json.loads(file.read_text(encoding="utf-8"))
        kinds = _FIELDS | {name: kind for name, kind in _OPTIONAL.items() if name in persona}
        wrong = [name for name, kind in kinds.items() if not isinstance(persona.get(name), kind)]
        texts = {name: persona.get(name) for name in ("name", "system_prompt", "dataset")}
        wrong += [
            name for name, text in texts.items() if isinstance(text, str) and not text.strip()
        ]
        if not all(isinstance(word, str) and word.strip() for word in persona.get("called") or [0]):
            wrong.append("called")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CourseError(
            f"角色文件 {file} 读不出来（{error}）：请检查 HUANHUAN_PERSONA。"
        ) from None
    if wrong:
        raise CourseError(
            f"角色文件 {file.name} 里缺少 {'、'.join(dict.fromkeys(wrong))}，或者类型不对：照 data/persona_huanhuan.json 的样子写。"
        )
    for number, fact in enumerate(persona.get("facts", []), 1):
        lists = [fact.get(part) for part in ("ask", "expected")] if isinstance(fact, dict) else [0]
        if not all(
            isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts)
            for texts in lists
        ):
            raise CourseError(
                f"角色文件 {file.name} 的 facts 第 {number} 项应当是 {_FACT}，请照着改。"
            )
    return persona


def read_questions(file: Path) -> dict:
    """The questions of the exam: ``known`` (trained on), ``identity``, ``daily`` (lists of texts) and
    ``general``: ordinary knowledge, ``{question: (words of which a right answer holds one, words that
    only a wrong one holds)}``, in the file ``[{"question", "expected", "wrong"}]``. Raises CourseError.
    """
    try:
        questions = json.loads(file.read_text(encoding="utf-8"))
        general = {
            one["question"]: (list(one["expected"]), list(one.get("wrong", [])))
            for one in questions["general"]
        }
        lists = {name: list(questions[name]) for name in ("known", "identity", "daily")}
        if not lists["known"]:
            raise ValueError("known 是空的")
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
