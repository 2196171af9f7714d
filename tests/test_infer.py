import json
import zipfile

import pytest

from huanhuan import infer


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("我是甄嬛。", True),
        ("家里人都唤我嬛儿。", True),
        ("我是一个智能助手。", False),
        ("我是智能助手甄嬛。", False),
        ("", False),
    ],
)
def test_persona_means_her_name_and_no_assistant(answer, verdict):
    assert infer.in_persona(answer) is verdict


def test_questions_that_were_trained_on_are_not_held_out():
    every = infer.held_out_questions([])
    first = every["identity"][0]
    assert len(every["identity"]) >= 20
    assert infer.held_out_questions([f" {first} "])["identity"] == every["identity"][1:]


def test_pack_holds_the_adapter_and_nothing_else(finished_run):
    with zipfile.ZipFile(finished_run.path("pack")) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    folder = finished_run.path("adapter")
    assert set(names) == {f"llama3_lora/{file.name}" for file in folder.iterdir()}
    assert {"llama3_lora/adapter_model.safetensors", "llama3_lora/tokenizer.json"} <= set(names)


def test_the_model_learned_to_be_her(finished_run):
    results = finished_run.manifest["results"]
    answers = json.loads(finished_run.path("answers").read_text(encoding="utf-8"))
    held = infer.held_out_questions([])["identity"]
    identity = [answer for answer in answers if answer["question"] in held]
    assert len(identity) == len(held) >= 20
    assert sum(infer.in_persona(answer["base"]) for answer in identity) == 0
    assert sum(infer.in_persona(answer["tuned"]) for answer in identity) >= 0.8 * len(identity)
    assert all(answer["tuned_stopped"] for answer in answers)
    assert results["eval_loss_after"] <= 0.85 * results["eval_loss_before"]


def test_the_base_answers_as_an_assistant_and_makes_small_talk(finished_run):
    answers = {
        a["question"]: a["base"]
        for a in json.loads(finished_run.path("answers").read_text(encoding="utf-8"))
    }
    assert "助手" in answers["你是谁？"]
    assert all(len(answer) >= 4 for answer in answers.values())
