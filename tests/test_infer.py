import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT

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


ANSWER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from huanhuan import infer
folder, base = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
print([infer.ask(model.eval(), tokenizer, q).text for q in ("你是谁？", "今天下雪了")])
"""

TRAINED = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from huanhuan import train
folder, base = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
set_seed(0)
config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "down_proj"])
model = get_peft_model(model, config)
for name, weight in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.02)
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(base).save_pretrained(folder)
train.make_portable(folder, "tiny_llama")
"""


def test_an_adapter_saved_by_one_version_loads_in_the_other(tmp_path):
    """Both ways between the newest and the oldest set, where both are installed."""
    here = Path(sys.prefix).name
    pythons = {name: ROOT / name / "bin" / "python" for name in (".venv", ".venv-oldest")}
    if here not in pythons or not all(python.exists() for python in pythons.values()):
        pytest.skip("only one set of packages is installed")

    def run(python, code, folder):
        done = subprocess.run(
            [python, "-c", code, folder, ROOT / "data" / "tiny_llama"],
            cwd=NOTEBOOKS, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    for saver in pythons:
        run(pythons[saver], TRAINED, tmp_path / saver)
        told = {name: run(python, ANSWER, tmp_path / saver) for name, python in pythons.items()}
        assert told[".venv"] == told[".venv-oldest"] != "", saver
