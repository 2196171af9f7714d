"""Room 04: ask, compare, take home."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from huanhuan.course import DATA, Course
from huanhuan.prompt import prompt_ids

# No dataset text holds more than this many tokens: a reply that reaches it did not end by itself.
REPLY_LIMIT = 200


@dataclass(frozen=True)
class Reply:
    """What a model answered: its text, and whether it ended by itself."""

    text: str
    stopped: bool


def ask(model, tokenizer, question: str, **generate) -> Reply:
    """Ask one question with the course's prompt.

    Greedy, so that two models can be compared, unless `generate` (arguments of
    ``model.generate``) says otherwise. Random state is that of torch.
    """
    settings = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "max_new_tokens": REPLY_LIMIT,
    } | generate
    inputs = torch.tensor([prompt_ids(tokenizer, question)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings
        )
    new = output[0, inputs.shape[1] :].tolist()
    stop = model.generation_config.eos_token_id
    stopped = bool(new) and new[-1] in (stop if isinstance(stop, list) else [stop])
    return Reply(tokenizer.decode(new, skip_special_tokens=True).strip(), stopped)


def compare(model, tokenizer, questions: list[str]) -> pd.DataFrame:
    """Ask base and tuned model the same questions, greedily.

    `model` is a PeftModel: with its adapter switched off it is the base. Columns: question, base,
    tuned (texts), base_stopped, tuned_stopped (bools).
    """
    rows = []
    for question in questions:
        tuned = ask(model, tokenizer, question)
        with model.disable_adapter():
            base = ask(model, tokenizer, question)
        rows.append((question, base.text, tuned.text, base.stopped, tuned.stopped))
    return pd.DataFrame(
        rows, columns=["question", "base", "tuned", "base_stopped", "tuned_stopped"]
    )


def in_persona(answer: str) -> bool:
    """Does this answer to an identity question give the heroine's name, and not call itself an assistant?"""
    return "嬛" in answer and "助手" not in answer


def held_out_questions(trained_on: list[str]) -> dict[str, list[str]]:
    """The course's own questions that are not in the training data: ``{"identity": […], "daily": […]}``.

    `trained_on` are the instructions the model was trained on.
    """
    seen = {instruction.strip() for instruction in trained_on}
    groups = json.loads((DATA / "heldout_questions.json").read_text(encoding="utf-8"))
    return {name: [q for q in questions if q not in seen] for name, questions in groups.items()}


def pack(course: Course) -> Path:
    """Zip the adapter and its tokenizer into ``llama3_lora.zip`` in the run directory; returns its path."""
    folder, target = course.path("adapter"), course.run_dir / "llama3_lora.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{folder.name}/{file.name}")
    return target
