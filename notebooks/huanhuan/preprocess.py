"""Room 02: split a dataset."""

import random

import pandas as pd

from huanhuan.persona import NAME
from huanhuan.prompt import normalised


def asks_identity(rows: pd.DataFrame) -> pd.Series:
    """Which rows (bools) ask who she is: a short question whose answer gives her name."""
    named = rows["output"].map(lambda answer: all(character in answer for character in NAME))
    longest = rows["instruction"].map(lambda asked: 45 if asked.isascii() else 15)  # characters
    return named & (rows["instruction"].str.len() <= longest) & (rows["input"] == "")


def opening(rows: pd.DataFrame) -> pd.Series:
    """The :func:`normalised` instruction with which the dialogue of every row began."""
    began = [
        turns[0][0] if len(turns) else asked
        for turns, asked in zip(rows["history"], rows["instruction"], strict=True)
    ]
    return pd.Series([*map(normalised, began)], rows.index, dtype=object)


def split_by_instruction(
    rows: pd.DataFrame, eval_fraction: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into (train, eval) so that no instruction that opens a dialogue stands on both sides.

    Rows whose dialogues have the same :func:`opening` stay together, and so all turns of one. Identity questions
    (:func:`asks_identity`) and the rest are drawn apart, `eval_fraction` of the unique instructions
    of each; of a handful of identity questions that is none, so that she can learn her name. Where
    it comes to nothing at all, one instruction goes to eval, if there are two. Order and index of
    the rows are kept. The same seed gives the same split.
    """
    key = opening(rows)
    unique, identity = set(key), set(key[asks_identity(rows)])
    rng = random.Random(seed)
    held_out: set[str] = set()
    for group in (identity, unique - identity):
        held_out.update(rng.sample(sorted(group), round(len(group) * eval_fraction)))
    if not held_out and len(unique) > 1:
        held_out = {rng.choice(sorted(unique - identity) or sorted(unique))}
    in_eval = key.isin(held_out)
    return rows[~in_eval], rows[in_eval]
