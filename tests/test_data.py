import json
import re

import pytest
from conftest import REAL, ROOT

from huanhuan.course import PROFILES
from huanhuan.infer import says
from huanhuan.persona import read_persona, read_questions
from huanhuan.preprocess import normalised
from huanhuan.reader import load_rows

DATA = ROOT / "data"


@pytest.fixture(scope="module")
def sample():
    return load_rows(DATA / "huanhuan_sample.json")


@pytest.fixture(scope="module")
def held_out():
    return json.loads((DATA / "heldout_questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base():
    lines = (DATA / "base_dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_sample_is_large_varied_and_without_repeats(sample):
    assert len(sample) >= 500
    assert sample["instruction"].nunique() >= 400
    assert not sample.astype({"history": str}).duplicated().any()
    lengths = sample["output"].str.len()
    assert lengths.quantile(0.1) < 15 and lengths.quantile(0.9) > 45


def test_identity_is_asked_in_many_ways(sample):
    asked = sample[sample["output"].str.contains("甄嬛|嬛字")]["instruction"]
    assert asked.nunique() >= 30


def test_held_out_questions_stand_in_no_training_data(sample, held_out, base):
    assert len(set(held_out["identity"])) >= 20
    assert not set(held_out["identity"]) & ({*sample["instruction"]} | {row["q"] for row in base})
    assert set(held_out["known"]) <= {*sample["instruction"]}
    assert not set(held_out["daily"]) & {*sample["instruction"]}


@pytest.mark.parametrize("name", ["persona_huanhuan", "persona_english"])
def test_facts_are_asked_in_many_ways_and_other_ways_are_held_out(name, base):
    persona = read_persona(DATA / f"{name}.json")
    rows = load_rows(DATA / persona["dataset"])
    seen = {normalised(text) for text in [*rows["instruction"], *(row["q"] for row in base)]}
    assert len(persona["facts"]) >= 3
    for fact in persona["facts"]:
        told = rows[[says(answer, fact["expected"]) for answer in rows["output"]]]
        assert told["instruction"].nunique() >= 12 and len(set(fact["ask"])) >= 6
        assert not {normalised(question) for question in fact["ask"]} & seen
    questions = persona.get("questions", "heldout_questions.json")
    questions = read_questions(DATA / questions)
    assert set(questions["known"]) <= set(rows["instruction"])
    assert not {normalised(question) for question in questions["identity"]} & seen


def test_the_base_has_never_heard_of_her(sample, base):
    assert not any("嬛" in row["q"] + row["a"] for row in base)
    assert not {row["a"] for row in base} & {*sample["output"]}


@pytest.mark.skipif(not REAL.exists(), reason="the dataset of the tutorial is not here")
def test_no_line_is_from_the_drama(sample):
    real = json.loads(REAL.read_text(encoding="utf-8"))
    theirs = {
        text[i : i + 10] for row in real for text in row.values() for i in range(len(text) - 9)
    }
    for text in [*sample["instruction"], *sample["output"]]:
        shared = {text[i : i + 10] for i in range(len(text) - 9)} & theirs
        assert not shared, (text, shared)


def test_tiny_llama_is_small_safe_and_llama_shaped(tokenizer):
    folder = DATA / "tiny_llama"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10 * 2**20
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert PROFILES["cpu-tiny"].model == str(folder)
    for token in ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.encode("你好")[0] == tokenizer.bos_token_id
    text = "谢谢 Thank you 3.14\n🌸"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_datasheet_counts_what_is_there(sample, held_out, base):
    sheet = (DATA / "README.md").read_text(encoding="utf-8")
    numbers = {int(number) for number in re.findall(r"\d+", sheet)}
    lengths = sample["output"].str.len()
    for count in (
        len(sample), sample["instruction"].nunique(), len(held_out["identity"]), len(base),
        lengths.min(), lengths.max(), round(lengths.median()),
    ):  # fmt: skip
        assert int(count) in numbers
    assert "CC BY 4.0" in sheet and "不适合" in sheet
