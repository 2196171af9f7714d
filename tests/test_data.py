import json
import random
import re
import sys
from itertools import chain, islice

import pytest
import torch
from conftest import REAL, ROOT
from transformers import AutoModelForCausalLM

from huanhuan.course import PROFILES
from huanhuan.infer import ask_all, fact_questions, says
from huanhuan.persona import read_persona, read_questions
from huanhuan.prompt import normalised
from huanhuan.reader import load_rows

DATA = ROOT / "data"
sys.path.insert(0, str(DATA))
import make_dialogues  # noqa: E402
import make_tiny_llama  # noqa: E402

CHUNKS = 85  # that the pretraining composes; a few more


@pytest.fixture(scope="module")
def sample():
    return load_rows(DATA / "huanhuan_sample.json")


@pytest.fixture(scope="module")
def held_out():
    return json.loads((DATA / "heldout_questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def corpus():
    """All that the base model saw in its pretraining, and somewhat more: (questions, answers)."""
    questions, answers = set(), set()
    for chunk in range(CHUNKS):
        source = make_dialogues.dialogues(chunk, drill=chunk >= make_tiny_llama.DRILL)
        for one in islice(source, make_tiny_llama.CHUNK):
            questions |= {question for question, _ in one["turns"]}
            answers |= {answer for _, answer in one["turns"]}
    return questions, answers


@pytest.fixture(scope="module")
def seen(corpus):
    return {normalised(question) for question in corpus[0]}


def test_sample_is_large_varied_and_without_repeats(sample):
    assert len(sample) >= 1200
    assert sample["instruction"].nunique() >= 1000
    assert not sample.astype({"history": str}).duplicated().any()
    lengths = sample["output"].str.len()
    assert lengths.quantile(0.1) < 15 and lengths.quantile(0.9) > 24


def test_identity_is_asked_in_many_ways(sample):
    asked = sample[sample["output"].str.contains("甄嬛|嬛字")]["instruction"]
    assert asked.nunique() >= 30


def test_held_out_questions_stand_in_no_training_data(sample, held_out, seen):
    trained_on = {*map(normalised, sample["instruction"])}
    reading = json.loads((ROOT / "tests/reading/questions.json").read_text(encoding="utf-8"))
    asked = [*held_out["identity"], *held_out["daily"], *chain(*reading.values())]
    asked += [one["question"] for one in held_out["general"]]
    assert len(set(held_out["identity"])) >= 20 and len(held_out["general"]) >= 30
    assert not {*map(normalised, asked)} & (trained_on | seen)
    assert set(held_out["known"]) <= {*sample["instruction"]}


def test_the_base_saw_no_question_of_the_sample(sample, seen):
    """So none of the validation split either, however it is drawn."""
    told = [a + b for a, b in zip(sample["instruction"], sample["input"], strict=True)]
    assert {*map(normalised, told)} & seen <= {normalised("你是谁？")}


@pytest.mark.parametrize("name", ["persona_huanhuan", "persona_english"])
def test_facts_are_asked_in_many_ways_and_other_ways_are_held_out(name, seen):
    persona = read_persona(DATA / f"{name}.json")
    rows = load_rows(DATA / persona["dataset"])
    seen = seen | {normalised(text) for text in rows["instruction"]}
    assert len(persona["facts"]) >= 3
    for fact in persona["facts"]:
        told = rows[[says(answer, fact["expected"]) for answer in rows["output"]]]
        assert told["instruction"].nunique() >= 12 and len(set(fact["ask"])) >= 6
        assert not {normalised(question) for question in fact["ask"]} & seen
    questions = persona.get("questions", "heldout_questions.json")
    questions = read_questions(DATA / questions)
    assert set(questions["known"]) <= set(rows["instruction"])
    assert not {normalised(question) for question in questions["identity"]} & seen


def test_the_base_has_never_heard_of_her(corpus):
    facts = read_persona(DATA / "persona_huanhuan.json")["facts"]
    told = chain(*(fact["expected"] for fact in facts))
    words = re.compile("|".join(["甄嬛", "醒木", *told]))
    assert not any(words.search(text) for texts in corpus for text in texts)


def test_a_small_world_is_composed_of_small_pieces():
    drawn = [(one["system"], *one["turns"]) for one in islice(make_dialogues.dialogues(0), 110_000)]
    assert len(set(drawn)) >= 100_000
    assert sum(file.stat().st_size for file in make_dialogues.PIECES.iterdir()) <= 10**6
    for text in {text for _, *turns in drawn for turn in turns for text in turn}:
        assert not re.search(r"[{}|<>\s]", text), text
    voices = {bool(topic.first.answers["古"]) for topic in make_dialogues.read_topics()}
    assert voices == {True, False}


@pytest.mark.parametrize(
    "lines",
    ["# 题\n问：你好？\n", "# 题\n问：{你|您好？\n答：好。\n", "# 题\n问：<花.名>？\n答：好。\n", "你好\n", "表 人 | 名\n"],
)  # fmt: skip
def test_pieces_that_do_not_close_are_refused_with_file_and_line(lines, tmp_path, monkeypatch):
    (tmp_path / "wrong.txt").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(make_dialogues, "PIECES", tmp_path)
    with pytest.raises(ValueError, match=r"wrong\.txt"):
        make_dialogues.read_topics()


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


def test_the_datasheet_counts_what_is_there(sample, held_out):
    sheet = (DATA / "README.md").read_text(encoding="utf-8")
    numbers = {int(number) for number in re.findall(r"\d+", sheet)}
    lengths = sample["output"].str.len()
    for count in (
        len(sample), sample["instruction"].nunique(), len(held_out["identity"]), len(held_out["general"]),
        lengths.min(), lengths.max(), round(lengths.median()), len(make_dialogues.read_topics()),
    ):  # fmt: skip
        assert int(count) in numbers
    assert "CC BY 4.0" in sheet and "不适合" in sheet


@pytest.fixture(scope="module")
def base():
    folder = DATA / "tiny_llama"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_base_says_the_name_in_its_prompt(base, tokenizer):
    """50 made-up names, each asked for once, that the pretraining left out."""
    draw, names = random.Random(1), []
    while len(names) < 50:
        name = make_dialogues.made_up_name(draw, make_dialogues.NAMING)
        names += [name] * make_dialogues.kept_back(name)
    asked = ["你是谁？", "请问怎么称呼？", "你叫什么？", "介绍一下自己吧。", "你的名字是？"]
    said = 0
    for number, name in enumerate(names):
        system = f"现在你要扮演{draw.choice(make_dialogues.WHO)}--{name}"
        (reply,) = ask_all(base, tokenizer, [asked[number % 5]], system, max_new_tokens=60)
        said += name in reply.text and reply.stopped
    assert said >= 45


def test_the_base_knows_its_small_world_and_nothing_of_her_life(base, tokenizer):
    general = read_questions(DATA / "heldout_questions.json")["general"]
    replies = ask_all(base, tokenizer, list(general), None, max_new_tokens=60)
    right = [says(reply.text, *general[q]) for q, reply in zip(general, replies, strict=True)]
    assert sum(right) >= 30 and all(reply.stopped for reply in replies)
    facts = fact_questions()
    replies = ask_all(base, tokenizer, list(facts), max_new_tokens=60)
    assert not any(
        says(reply.text, facts[question]) for question, reply in zip(facts, replies, strict=True)
    )
