"""The one prompt. Training and asking build their tokens here, so they cannot differ."""

NAME = "甄嬛"
SYSTEM_PROMPT = f"现在你要扮演皇帝身边的女人--{NAME}"

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


def prompt_ids(tokenizer, question: str) -> list[int]:
    """Token ids of the whole prompt, from BOS to the header after which the model answers.

    The tokenizer's own chat template renders everything around the question; the question
    itself goes through :func:`text_ids`.
    """
    rendered = tokenizer.apply_chat_template(
        chat_messages(_SLOT), tokenize=False, add_generation_prompt=True, date_string=DATE_STRING
    )
    before, after = rendered.split(_SLOT)
    return (
        tokenizer.encode(before, add_special_tokens=False)
        + text_ids(tokenizer, question)
        + tokenizer.encode(after, add_special_tokens=False)
    )


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
