"""The matrix of faults: what strikes, where, what is said, and that nothing made is lost.

    python tests/faults/faults.py        writes the table of README.md anew, from a run of all of them

Each fault is a generator: it lets the fault strike a run that is whole, yields, and then does what a
learner does next. That ends in a sentence (a CourseError that `says`), or goes through as if nothing
had happened. Whatever lay in the run directory when it struck must still be there, under its own name
or a dated one, nothing may be written elsewhere, and it takes at most 5 seconds (but for training) and
1 GiB. tests/test_faults.py runs them all.
"""

import ast
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from conftest import NOTEBOOKS, ROOT, notebook_process_func
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from huanhuan import CourseError, cleanup, course, exercises, infer, persona, reader, setup, train
from huanhuan.course import Course
from huanhuan.persona import read_persona, read_questions
from huanhuan.prompt import end_generation, prompt_ids

LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
MARKS = ("<!-- faults -->", "<!-- /faults -->")  # of the table in README.md


@dataclass(frozen=True)
class Fault:
    kind: str
    where: str  # the notebook in which it strikes, or "带走"
    says: str | None  # a regular expression; None: it goes through
    strike: Callable


FAULTS: list[Fault] = []


def fault(kind: str, where: str, says: str | None) -> Callable:
    def register(strike: Callable) -> Callable:
        FAULTS.append(Fault(kind, where, says, strike))
        return strike

    return register


class Run:
    """A run of the course that is whole, in `dir`, and may be harmed."""

    def __init__(self, folder: Path):
        self.dir = folder
        self.data, self.model = folder / "data.json", folder / "model"
        self.tokenized, self.adapter = folder / "tokenized", folder / "llama3_lora"
        self.weights, self.pack = (
            self.adapter / "adapter_model.safetensors",
            folder / "llama3_lora.zip",
        )
        self.manifest = folder / "manifest.json"
        self.checkpoints = folder / "checkpoints"

    def change_manifest(self, change: Callable[[dict], object]) -> None:
        content = json.loads(self.manifest.read_text(encoding="utf-8"))
        change(content)
        self.manifest.write_text(json.dumps(content), encoding="utf-8")

    def change_weights(self, change: Callable) -> None:
        save_file({n: change(x) for n, x in load_file(self.weights).items()}, self.weights)

    def repacked(self, change: Callable[[dict], object], sums: bool = True) -> Path:
        """A pack whose members `change` has changed, with checksums that fit unless told not to."""
        with zipfile.ZipFile(self.pack) as packed:
            content = {name: packed.read(name) for name in packed.namelist()}
        change(content)
        if sums:
            lines = [
                f"{hashlib.sha256(data).hexdigest()}  {name.removeprefix('llama3_lora/')}\n"
                for name, data in content.items()
                if not name.endswith("SHA256SUMS")
            ]
            content["llama3_lora/SHA256SUMS"] = "".join(lines).encode()
        archive = self.dir.parent / "stranger.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in content.items():
                packed.writestr(name, data)
        return archive

    def unpack(self, archive: Path) -> Path:
        return infer.unpack(archive, self.dir / "local")


def make_run(folder: Path) -> None:
    """A small run in `folder`, made as the notebooks make it, but for the training itself."""
    os.environ["HUANHUAN_OUTPUT"] = str(folder)
    run = Run(folder)
    shutil.copytree(ROOT / "data" / "tiny_llama", run.model)
    rows = json.loads((ROOT / "data" / "huanhuan_sample.json").read_text("utf-8"))[:24]
    run.data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    this = Course.start(model=str(run.model))
    this.keep("data", run.data)
    this.keep("model", run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    process = notebook_process_func(tokenizer, 384)
    made = Dataset.from_list(
        [process(row) for row in reader.load_rows(run.data).to_dict("records")]
    )
    with this.making("tokenized", train_rows=20, eval_rows=4) as beside:
        DatasetDict(train=made.select(range(20)), eval=made.select(range(20, 24))).save_to_disk(
            beside
        )
    lora = adapted(run)
    with this.making("adapter", eval_loss_before=3.0, eval_loss_after=2.0) as beside:
        with train.as_if_trained(lora):
            lora.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        train.make_portable(beside, "tiny_llama")
    with this.making("answers") as file:
        file.write_text("[]", encoding="utf-8")
    with this.making("pack") as file:
        infer.pack(this, file)
    (folder / "chats").mkdir()
    (folder / "chats" / "chat-1.json").write_text("[]", encoding="utf-8")


def adapted(run: Run):
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=train.SEVEN)
    return get_peft_model(model, config)


def trained(run: Run, steps: int = 4, recipe: dict | None = None, **changes) -> train.CourseTrainer:
    """Train so many steps with a checkpoint each, as notebook 03 does."""
    this = Course.resume("tokenized")
    args = TrainingArguments(
        run.checkpoints, **{"max_steps": steps, "save_steps": 1, "save_total_limit": 3} | changes,
        per_device_train_batch_size=16, logging_steps=1, use_cpu=True, report_to="none",
    )  # fmt: skip
    lora = adapted(run)
    rows = Dataset.load_from_disk(str(run.tokenized / "train"))
    collator = train.SharedPrefixCollator()
    trainer = train.CourseTrainer(model=lora, args=args, train_dataset=rows, data_collator=collator)
    point = train.resume_point(this, recipe or {}, train.Split(16))
    with this.locked("训练"):
        trainer.train(resume_from_checkpoint=point)
    return trainer


# --- what was made of what is not there any more -------------------------------------------------


@fault("数据集在原地改过一个字", "03", "数据集.*改动过.*01_setup")
def _(run):
    run.data.write_text(run.data.read_text("utf-8").replace("。", "！", 1), encoding="utf-8")
    yield
    Course.resume("tokenized")


@fault("数据集删掉了", "02", "还缺少.*数据集.*01_setup")
def _(run):
    run.data.unlink()
    yield
    Course.resume("data")


@fault("换了数据集，01、02 重做了，03 没有", "04", "以前的“处理好的数据”.*03_train_lora")
def _(run):
    run.data.write_text(run.data.read_text("utf-8").replace("。", "！", 1), encoding="utf-8")
    Course.start(model=str(run.model)).keep("data", run.data)
    this = Course.resume()
    with this.making("tokenized") as beside:
        (beside / "rows").write_text("another split", encoding="utf-8")
    yield
    Course.resume("adapter")


@fault("模型的权重换成了另一份", "04", "模型.*改动过.*01_setup")
def _(run):
    file = run.model / "model.safetensors"
    save_file({name: x + 1 for name, x in load_file(file).items()}, file, {"format": "pt"})
    yield
    Course.resume("adapter")


@fault("模型的权重被截短", "01", "不完整")
def _(run):
    file = run.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    yield
    setup.check_model(run.model)


@fault("模型目录少了分词器", "01", "用不了|缺少")
def _(run):
    for file in run.model.glob("tokenizer*"):
        file.unlink()
    yield
    setup.check_kind(run.model)


@fault("模型的 config.json 不是 JSON", "01", "config.json 读不出来")
def _(run):
    (run.model / "config.json").write_text("{", encoding="utf-8")
    yield
    setup.check_kind(run.model)


@fault("模型要执行随它来的程序", "01", "auto_map")
def _(run):
    file = run.model / "config.json"
    config = json.loads(file.read_text("utf-8")) | {"auto_map": {"AutoModel": "evil.Model"}}
    file.write_text(json.dumps(config), encoding="utf-8")
    yield
    setup.check_kind(run.model)


@fault("模型的聊天模板是一个转不完的圈", "01", "写不完")
def _(run):
    file = run.model / "chat_template.jinja"
    file.write_text(LOOP, encoding="utf-8")
    yield
    setup.check_kind(run.model)


for title, template, says in (
    ("要 3 GB", "{% set a = 'x' * 3000000000 %}", "写不完"),
    ("要算一个天大的数", "{% set a = 9 ** (9 ** 9) %}", "写不完"),
    ("除以零", "{{ 1 // 0 }}", "用不了"),
    ("里的括号套了五千层", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "用不了"),
):

    def template_of(run, template=template):
        (run.model / "chat_template.jinja").write_text(template, encoding="utf-8")
        yield
        setup.check_kind(run.model)

    fault(f"模型的聊天模板{title}", "01", says)(template_of)

for title, name, text, says in (
    ("的设置套了十万层", "config.json", "[" * 100_000, "读不出来"),
    ("的种类是一个数组", "config.json", '{"model_type": []}', "不认识"),
    ("的 generation_config.json 是一个数组", "generation_config.json", "[]", "用不了"),
    ("目录里混着一个适配器", "adapter_config.json", "{}", "混着一个适配器"),
):

    def told(run, name=name, text=text):
        (run.model / name).write_text(text, encoding="utf-8")
        yield
        setup.check_kind(run.model)

    fault(f"模型{title}", "01", says)(told)


@fault("模型的权重少了几层", "01", "权重比 config.json 说的少")
def _(run):
    file = run.model / "model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if "layers.1." not in n}, file)
    yield
    setup.check_model(run.model)


@fault("模型说自己有三千层", "01", "权重比 config.json 说的少")
def _(run):
    config = json.loads((run.model / "config.json").read_text("utf-8"))
    (run.model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3000}))
    yield
    setup.check_model(run.model)


@fault("模型目录里全是链接，链接指着的权重换了", "04", "模型.*改动过.*01_setup")
def _(run):
    linked = run.dir.parent / "linked"
    linked.mkdir()
    for file in run.model.iterdir():
        (linked / file.name).symlink_to(file)
    this = Course.start(model=str(linked))
    this.keep("model", linked)
    file = run.model / "model.safetensors"
    save_file({name: x + 1 for name, x in load_file(file).items()}, file)
    yield
    Course.resume("model")


@fault("模型要一次答两遍，还限了时间（generation_config）", "04", None)
def _(run):
    model = AutoModelForCausalLM.from_pretrained(run.model)
    model.generation_config.update(num_beams=2, num_return_sequences=2, max_time=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    end_generation(model, tokenizer)
    yield
    replies = infer.ask_all(model, tokenizer, ["你是谁？", "吃了吗？"])
    assert len(replies) == 2 and all(len(reply.text) > 1 for reply in replies)


@fault("模型的权重是 pickle", "01", "pickle")
def _(run):
    (run.model / "model.safetensors").rename(run.model / "pytorch_model.bin")
    yield
    setup.look_at_model(Course.start(model=str(run.model)))


@fault("处理好的数据少了一个文件", "03", "处理好的数据.*不完整.*02_preprocess")
def _(run):
    next(run.tokenized.rglob("*.arrow")).unlink()
    yield
    Course.resume("tokenized")


@fault("处理好的数据坏了几个字节", "03", "处理好的数据.*改动过.*02_preprocess")
def _(run):
    file = next(run.tokenized.rglob("*.arrow"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    yield
    Course.resume("tokenized")


@fault("02 写到一半被杀", "03", None)
def _(run):
    half = run.dir / "unfinished-tokenized"
    half.mkdir()
    (half / "rows").write_text("half", encoding="utf-8")
    yield
    Course.resume("tokenized", "adapter")


@fault("max_length 改小了，没有重做 02", "03", "max_length=384.*256.*02_preprocess")
def _(run):
    Course.start(model=str(run.model), max_length=256).keep("data", run.data)
    yield
    Course.resume("tokenized")


@fault("在 01 里改成 r=64、99 轮，没有重做 03", "04", "epochs=2.*99.*03_train_lora")
def _(run):
    Course.start(model=str(run.model), lora_r=64, epochs=99).keep("data", run.data)
    yield
    Course.resume("adapter")


@fault("角色的提示词改了，没有重做 02", "03", "system_prompt.*02_preprocess")
def _(run):
    with patched(course, "SYSTEM_PROMPT", "你是别人"):
        yield
        Course.resume("tokenized")


@fault("角色文件里的 profile 改了，没有重做 01", "03", "profile 改过.*01_setup")
def _(run):
    with patched(course, "PERSONA", persona.PERSONA | {"profile": {"epochs": 9}}):
        yield
        Course.resume()


@fault("HUANHUAN_MODEL 换了，没有重做 01", "03", "HUANHUAN_MODEL 现在是.*01_setup")
def _(run):
    with environ(HUANHUAN_MODEL="some/other"):
        yield
        Course.resume()


@fault("01 是在有显卡的机器上做的", "04", "有 cuda 的机器")
def _(run):
    run.change_manifest(lambda m: m["profile"].update(device="cuda", dtype="bfloat16"))
    yield
    Course.resume()


@fault("适配器在这个内核读入以后，另一个内核又训练了", "04", "读入以后变了.*重启内核")
def _(run):
    mine = Course.resume("adapter")
    other = Course.resume("adapter")
    with other.making("adapter") as beside:
        shutil.copytree(run.adapter, beside, dirs_exist_ok=True)
        run.weights.with_name("more.txt").unlink(missing_ok=True)
        (beside / "more.txt").write_text("另一次", encoding="utf-8")
    yield
    with mine.making("pack") as file:
        file.write_bytes(b"")


@fault("手改了 LoraConfig 和学习率再训练", "04", None)
def _(run):
    used = {"lora_r": 2, "learning_rate": 5e-3, "epochs": 7}
    with Course.resume().making(
        "adapter", eval_loss_before=3.0, eval_loss_after=2.0, **used
    ) as beside:
        shutil.copytree(run.adapter, beside, dirs_exist_ok=True)
    yield
    card = infer.model_card(Course.resume("adapter"))
    assert "r=2" in card and "7 轮" in card and "0.005" in card


@fault("成果是另一个角色的", "03", "HUANHUAN_PERSONA")
def _(run):
    run.change_manifest(lambda m: m["persona"].update(name="醒木先生"))
    yield
    Course.resume()


@fault("适配器的文件不见了", "04", "适配器.*不完整.*03_train_lora")
def _(run):
    run.weights.unlink()
    yield
    Course.resume("adapter")


@fault("适配器的权重改过", "04", "适配器.*改动过.*03_train_lora")
def _(run):
    run.change_weights(lambda x: x + 1)
    yield
    Course.resume("adapter")


@fault("适配器的记录不见了", "04", "没有它的记录.*03_train_lora")
def _(run):
    (run.adapter / "made.json").unlink()
    yield
    Course.resume("adapter")


@fault("适配器的记录不是 JSON", "04", "读不出来.*03_train_lora")
def _(run):
    (run.adapter / "made.json").write_text("[1", encoding="utf-8")
    yield
    Course.resume("adapter")


@fault("03 在保存时被杀", "04", None)
def _(run):
    half = run.dir / "unfinished-llama3_lora"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    yield
    assert infer.check_adapter(Course.resume("adapter").path("adapter")) is None


@fault("文件只是被碰过，时间变了", "04", None)
def _(run):
    for file in [*run.tokenized.rglob("*"), *run.adapter.rglob("*"), run.data]:
        os.utime(file, (1, 1))
    yield
    Course.resume("tokenized", "adapter", "pack")


@fault("整个运行目录拷到了别处", "04", None)
def _(run):
    there = run.dir.parent / "elsewhere"
    shutil.copytree(run.dir, there, copy_function=shutil.copy)
    os.environ["HUANHUAN_OUTPUT"] = str(there)
    yield
    Course.resume("adapter", "pack")


# --- the list itself, and what lies about --------------------------------------------------------


@fault("清单写到一半断了", "02", "manifest.json 读不出来.*01_setup")
def _(run):
    run.manifest.write_text(run.manifest.read_text("utf-8")[:50], encoding="utf-8")
    yield
    Course.resume()


@fault("清单是空的 JSON", "02", "manifest.json 读不出来.*01_setup")
def _(run):
    run.manifest.write_text("{}", encoding="utf-8")
    yield
    Course.resume()


@fault("清单是一个数组", "02", "manifest.json 读不出来.*01_setup")
def _(run):
    run.manifest.write_text("[]", encoding="utf-8")
    yield
    Course.resume()


@fault("清单不是 UTF-8", "02", "manifest.json 读不出来.*01_setup")
def _(run):
    run.manifest.write_bytes(b"\xff\xfe\x00{")
    yield
    Course.resume()


@fault("清单是以前版本的", "04", "没有它的记录.*03_train_lora")
def _(run):
    run.change_manifest(lambda m: m.update(known={}))
    yield
    Course.resume("adapter")


@fault("清单里的适配器指到运行目录外面", "04", "不在运行目录里.*03_train_lora")
def _(run):
    run.change_manifest(lambda m: m["files"].update(adapter=str(run.dir.parent)))
    yield
    Course.resume("adapter")


@fault("清单里的设置不是数", "02", "epochs=.*不行|读不出来")
def _(run):
    run.change_manifest(lambda m: m["profile"].update(epochs="很多"))
    yield
    Course.resume()


@fault("适配器目录里多了 .ipynb_checkpoints", "带走", None)
def _(run):
    (run.adapter / ".ipynb_checkpoints").mkdir()
    (run.adapter / ".ipynb_checkpoints" / "x.json").write_text("{}", encoding="utf-8")
    yield
    packed_names(run, without="ipynb")


@fault("适配器目录里有一个指到外面的链接", "带走", None)
def _(run):
    secret = run.dir.parent / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    (run.adapter / "secret.txt").symlink_to(secret)
    yield
    packed_names(run, without="secret")


@fault("适配器目录里放了别的文件", "带走", None)
def _(run):
    (run.adapter / "diary.txt").write_text("不给人看", encoding="utf-8")
    yield
    packed_names(run, without="diary")


@fault("以前的 scores.json 坏了", "04", None)
def _(run):
    older = run.dir / "llama3_lora-20200101-000000"
    older.mkdir()
    (older / "scores.json").write_text("{", encoding="utf-8")
    (run.adapter / "scores.json").write_text('{"rank": 8}', encoding="utf-8")
    yield
    assert len(infer.score_table(infer.past_runs(Course.resume())).columns) == 2


@fault("uploads 里多了 .ipynb_checkpoints", "01", None)
def _(run):
    (run.dir / "uploads" / ".ipynb_checkpoints").mkdir(parents=True)
    yield
    assert setup.dataset_file(Course.resume()) == persona.SAMPLE


@fault("要清理的名字带着 ../", "05", "不是上面列出的名称")
def _(run):
    yield
    cleanup.remove(Course.resume(), ["../secret"], really=True)


@fault("要清理的是一个指到外面的链接", "05", "不是上面列出的名称")
def _(run):
    (run.dir / "link").symlink_to(run.dir.parent)
    yield
    cleanup.remove(Course.resume(), ["link"], really=True)


def packed_names(run: Run, without: str) -> None:
    this = Course.resume("adapter")
    with this.making("pack") as file:
        infer.pack(this, file)
    with zipfile.ZipFile(this.path("pack")) as packed:
        names = packed.namelist()
    assert "llama3_lora/adapter_model.safetensors" in names
    assert not [name for name in names if without in name]


# --- settings, persona, environment --------------------------------------------------------------

for given in (
    {"epochs": 0}, {"epochs": -1}, {"epochs": "3"}, {"epochs": 10**9}, {"lora_r": 0}, {"lora_r": True},
    {"learning_rate": float("nan")}, {"learning_rate": 0}, {"max_length": 3}, {"max_rows": 0},
    {"micro_batch": 99}, {"quantized": "yes"}, {"model": " "}, {"lora_dropout": 1.0}, {"dtype": 16},
    {"dtype": "int8"}, {"dtype": "fp16"}, {"dtype": "float64"}, {"device": "tpu"}, {"micro_batch": 3},
):  # fmt: skip

    def settings(run, given=given):
        yield
        Course.start(**given)

    (name, value) = next(iter(given.items()))
    fault(f"`Course.start({name}={value!r})`", "01", "不行：要写")(settings)


@fault("`Course.start(epochs=10**6000)`", "01", "epochs=这么长的数 不行")
def _(run):
    yield
    Course.start(epochs=10**6000)


@fault("`Course.start(device='cuda')`，没有显卡", "01", "用不了 cuda")
def _(run):
    yield
    Course.start(device="cuda")


@fault("模型名有五千个字", "01", "找不到模型目录")
def _(run):
    yield
    setup.look_at_model(Course.start(model="x" * 5000))


@fault("`Course.start` 里拼错了名字", "01", "没有 epoch 这一项")
def _(run):
    yield
    Course.start(epoch=3)


for text, says in (
    ("{", "读不出来"), ("[]", "读不出来"), ('{"name": "甲"}', "缺少 system_prompt"), ("", "读不出来"),
    ('{"name": 1, "system_prompt": "x", "called": ["x"], "dataset": "x"}', "类型不对"),
    ('{"name": "甲", "system_prompt": " ", "called": ["x"], "dataset": "x"}', "缺少 system_prompt"),
    ('{"name": "甲", "system_prompt": "x", "called": [1], "dataset": "x"}', "called"),
    ('{"name": "甲", "system_prompt": "x", "called": ["x"], "dataset": "x", "profile": null}', "profile"),
    ('{"name": "甲", "system_prompt": "x", "called": ["x"], "dataset": "x", "facts": [1]}', "facts"),
    ("[" * 100_000, "套得太深"),
    ('{"name": "甲", "system_prompt": "\\ud800", "called": ["x"], "dataset": "x"}', "system_prompt"),
    ('{"name": "甲", "system_prompt": "x", "called": ["x"], "dataset": "\\u0000"}', "dataset"),
):  # fmt: skip

    def bad_persona(run, text=text):
        file = run.dir.parent / "me.json"
        file.write_text(text, encoding="utf-8")
        yield
        read_persona(file)

    fault(f"角色文件写成 `{text[-60:] or '空的'}`", "01", says)(bad_persona)


@fault("考题文件里没有 known", "01", "考题文件.*读不出来")
def _(run):
    file = run.dir.parent / "questions.json"
    file.write_text('{"general": [], "identity": [], "daily": []}', encoding="utf-8")
    yield
    read_questions(file)


GOOD = {"known": ["你是谁？"], "identity": [], "daily": [], "general": []}
ORDINARY = {"question": "一加一？", "expected": ["二"]}
for change in (
    {"known": "你是谁？"}, {"known": [1]}, {"identity": [None]}, {"general": [ORDINARY | {"expected": "二"}]},
    {"general": [ORDINARY | {"expected": [""]}]}, {"general": [ORDINARY | {"question": 5}]}, {"general": 3},
):  # fmt: skip

    def bad_questions(run, change=change):
        file = run.dir.parent / "questions.json"
        file.write_text(json.dumps(GOOD | change), encoding="utf-8")
        yield
        read_questions(file)

    told = json.dumps(change, ensure_ascii=False)
    fault(f"考题文件里写着 `{told}`", "01", "考题文件.*读不出来")(bad_questions)


@fault("考题文件和角色文件带着 BOM", "01", None)
def _(run):
    asked, mine = run.dir.parent / "questions.json", run.dir.parent / "me.json"
    asked.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    me = {"name": "甲", "system_prompt": "x", "called": ["x"], "dataset": "x"}
    mine.write_text(json.dumps(me), encoding="utf-8-sig")
    yield
    assert read_questions(asked)["known"] and read_persona(mine)["name"] == "甲"


@fault("RANK、WORLD_SIZE 是别的程序留下的", "03", None)
def _(run):
    yield
    code = "from huanhuan import course; print(course.RANK, course.PROCESSES)"
    given = os.environ | {"RANK": "1", "WORLD_SIZE": "abc"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=NOTEBOOKS, env=given, capture_output=True, text=True
    )
    assert done.stdout == "0 1\n", done.stderr


@fault("角色的提示词比 max_length 还长", "01", "提示词.*放不下")
def _(run):
    with patched(setup, "prompt_ids", partial(prompt_ids, system="你要扮演" + "甄嬛" * 400)):
        yield
        setup.look_at_model(Course.start(model=str(run.model)))


for name, value, says in (
    ("HUANHUAN_PROFILE", "tpu", "不认识.*cpu-tiny"),
    ("HUANHUAN_PROFILE", "gpu-bf16", "用不了.*cpu-tiny"),
    ("HUANHUAN_PROFILE", "gpu-4bit", "用不了.*cpu-tiny"),
    ("HUANHUAN_PROFILE", "mac", "用不了.*cpu-tiny"),
):

    def environment(run, name=name, value=value):
        with environ(**{name: value}):
            yield
            Course.start()

    if value == "tpu" or not torch.cuda.is_available():
        fault(f"`{name}={value}`，这里没有", "01", says)(environment)


@fault("HUANHUAN_MODEL 写错了路径", "01", "找不到模型目录.*HUANHUAN_MODEL")
def _(run):
    yield
    setup.local_folder("./no/such/model")


@fault("HUANHUAN_DATA 写错了路径", "01", "找不到数据集.*找过的地方是")
def _(run):
    with environ(HUANHUAN_DATA="no-such-file.json"):
        yield
        setup.dataset_file(Course.start())


for name, value, meant in (
    ("HUANHUAN_OUTPUT", '"~/x"', str(Path.home() / "x")),
    ("HUANHUAN_DATA", " 'data/huanhuan_sample.json' ", str(ROOT / "data" / "huanhuan_sample.json")),
    ("HUANHUAN_MODEL", "“data/tiny_llama”", str(ROOT / "data" / "tiny_llama")),
):

    def quoted(run, name=name, value=value, meant=meant):
        yield
        code = f"import os, huanhuan; print(os.environ[{name!r}])"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=NOTEBOOKS, env=os.environ | {name: value},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == meant and "不算在内" in done.stdout, done

    fault(f"`{name}` 的值带着引号、空白或 ~", "01", None)(quoted)


# --- full and forbidden disks --------------------------------------------------------------------

for number, says in (
    (28, "磁盘满了.*HUANHUAN_OUTPUT"),
    (30, "不能写.*HUANHUAN_OUTPUT"),
    (13, "不能写"),
):
    for name, what in (("tokenized", "02"), ("adapter", "03"), ("answers", "04"), ("pack", "带走")):

        def full(run, number=number, name=name):
            yield
            with Course.resume().making(name) as beside:
                (beside / "half" if beside.is_dir() else beside).write_bytes(b"half")
                raise OSError(number, os.strerror(number))

        title = {28: "磁盘满了", 30: "磁盘只读", 13: "没有权限"}[number]
        fault(f"{title}，正在写 {name}", what, says)(full)


@fault("磁盘满了，正在写检查点", "03", "磁盘满了.*HUANHUAN_OUTPUT")
def _(run):
    trained(run, 2)
    yield
    with patched(torch, "save", refused(28)):
        trained(run, 4, max_steps=4)


@fault("磁盘满了，正在写清单", "02", "磁盘满了.*HUANHUAN_OUTPUT")
def _(run):
    yield
    with patched(course, "write_json", refused(28)):
        Course.resume().finish("02_preprocess")


@fault("磁盘满了，正在存聊天", "04", "磁盘满了.*HUANHUAN_OUTPUT")
def _(run):
    chat = infer.Chat(None, None, run.dir / "chats")
    chat.turns, chat._hers = [("在吗？", "在。")], [True]
    yield
    with patched(infer, "write_json", refused(28)):
        chat.save()


for number, name, says in (
    (122, "配额用完了", "磁盘满了"), (107, "网盘断开了", "出错"), (5, "磁盘坏了", "出错"),
    (116, "网盘上的文件换了", "出错"),
):  # fmt: skip

    def broken(run, number=number):
        yield
        with patched(Path, "write_text", refused(number)):
            Course.resume().finish("02_preprocess")

    fault(f"写清单的时候{name}", "02", says)(broken)


@fault("HUANHUAN_OUTPUT 是一个文件", "01", "HUANHUAN_OUTPUT")
def _(run):
    with environ(HUANHUAN_OUTPUT=str(run.data)):
        yield
        Course.start().keep("data", run.data)


@fault("清单是一个目录", "02", "读不出来")
def _(run):
    run.manifest.unlink()
    run.manifest.mkdir()
    yield
    Course.resume()


@fault("filled.json 是一个指到外面的链接", "01", None)
def _(run):
    precious = run.dir.parent / "precious.json"
    precious.write_text("别动", encoding="utf-8")
    (run.dir / "filled.json").symlink_to(precious)
    rows = reader.load_rows(run.data)
    rows.attrs["placeholders"] = {"{{name}}": 1}
    yield
    setup.without_placeholders(Course.resume(), run.data, rows, {"{{name}}": "甄嬛"})
    assert precious.read_text("utf-8") == "别动"


@fault("占位符换成了一个数", "01", "带引号的文字")
def _(run):
    rows = reader.load_rows(run.data)
    rows.attrs["placeholders"] = {"{{name}}": 1}
    yield
    setup.without_placeholders(Course.resume(), run.data, rows, {"{{name}}": 5})


@fault("uploads 是一个指到外面的链接", "01", None)
def _(run):
    outside = run.dir.parent / "outside"
    outside.mkdir()
    (run.dir / "uploads").symlink_to(outside)
    yield
    upload = Course.resume().replacing(run.dir / "uploads" / "a.json")
    with contextlib.suppress(CourseError), upload as file:
        file.write_text("[]", encoding="utf-8")
    assert not [*outside.iterdir()]


@fault("exercises.json 带着 BOM", "01", None)
def _(run):
    (run.dir / "exercises.json").write_text('{"1.1": "2026"}', encoding="utf-8-sig")
    yield
    assert exercises.done(run.dir)["01_setup"][0] == 1


@fault("exercises.json 写到一半断了", "01", None)
def _(run):
    (run.dir / "exercises.json").write_text('{"1.1": "20', encoding="utf-8")
    yield
    exercises.check("1.2", 2 * 2**20 / 2**30, parameters=2**20)
    assert exercises.done(run.dir)["01_setup"][0] == 1


@fault("磁盘满了，正在解压", "带走", "磁盘满了")
def _(run):
    yield
    with patched(shutil, "copyfileobj", refused(28)):
        run.unpack(run.pack)


def refused(number: int) -> Callable:
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


# --- two at once ---------------------------------------------------------------------------------


@fault("两个内核同时训练", "03", "另一个内核（进程 .*训练")
def _(run):
    with other_process(
        "with Course.resume().locked('训练'): print('held', flush=True); time.sleep(60)"
    ):
        yield
        trained(run, 1)


@fault("占着运行目录的内核死了", "03", None)
def _(run):
    code = "import os; mine = Course.resume().locked('训练'); mine.__enter__(); print('held', flush=True); os._exit(9)"
    with other_process(code):
        pass
    assert (run.dir / "run.lock").exists()
    yield
    trained(run, 1)


def foreign(run, seconds: float, **others) -> None:
    """A lock of another machine, so many seconds old."""
    lock = run.dir / "run.lock"
    lock.write_text(json.dumps({"host": "colab-vm", "pid": 1, "started": 0} | others))
    os.utime(lock, (time.time() - seconds,) * 2)


@fault("另一台机器刚才还拿着锁", "03", "另一个内核.*run.lock")
def _(run):
    foreign(run, 30)
    yield
    trained(run, 1)


@fault("另一台机器拿着锁，早就关了", "03", None)
def _(run):
    foreign(run, 86400)
    yield
    trained(run, 1)


@fault("这个内核自己的锁，■ 的时候落下的", "03", None)
def _(run):
    foreign(run, 0, host=platform.node(), pid=os.getpid())
    yield
    trained(run, 1)


@fault("锁是一个目录", "03", "删掉.*run.lock")
def _(run):
    (run.dir / "run.lock").mkdir()
    yield
    trained(run, 1)


@fault("锁文件写到一半断了", "03", None)
def _(run):
    (run.dir / "run.lock").write_text("{", encoding="utf-8")
    os.utime(run.dir / "run.lock", (1, 1))
    yield
    trained(run, 1)


@fault("另一本笔记本同时在写清单", "02", None)
def _(run):
    one, other = Course.resume(), Course.resume()
    yield
    one.finish("02_preprocess")
    other.finish("04_infer")
    assert {"02_preprocess", "04_infer"} <= Course.resume().manifest["notebooks"].keys()


@contextlib.contextmanager
def other_process(code: str) -> Iterator[None]:
    head = f"import sys, time; sys.path.insert(0, {str(NOTEBOOKS)!r}); from huanhuan.course import Course\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        time.sleep(0.2)
        process.kill()
        process.wait()


# --- training ------------------------------------------------------------------------------------


@fault("学习率太大，损失成了 NaN", "03", "损失是 nan.*学习率")
def _(run):
    yield
    trained(run, 30, learning_rate=1e9, warmup_steps=0)


@fault("按 ■ 停下", "03", "停在第 2 步，已存好；再运行这一格就接着训练")
def _(run):
    yield
    stopping_at(run, 2)


@fault("■ 以后再运行", "03", None)
def _(run):
    straight = trained(run, 4).model
    with contextlib.suppress(CourseError):
        stopping_at(run, 2, recipe={"again": True})
    yield
    resumed = trained(run, 4, recipe={"again": True}).model
    same = zip(straight.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


@fault("训练那一格运行了两遍", "03", None)
def _(run):
    trainer = trained(run, 3)
    first = [p.clone() for p in trainer.model.parameters()]
    yield
    trainer.train(resume_from_checkpoint=train.resume_point(Course.resume(), {}, train.Split(16)))
    assert all(map(torch.equal, first, trainer.model.parameters()))
    trainer.train()
    assert all(map(torch.equal, first, trainer.model.parameters()))


@fault("训练到了头，没有保存，内核就死了", "03", None)
def _(run):
    first = trained(run, 3).model
    yield
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        again = trained(run, 3).model
    assert "不用再训练" in said.getvalue()
    assert all(map(torch.equal, first.parameters(), again.parameters()))


@fault("■ 以后改了学习率再运行", "03", None)
def _(run):
    with contextlib.suppress(CourseError):
        stopping_at(run, 2)
    yield
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer = trained(run, 4, learning_rate=1e-3)
    assert "learning_rate" in said.getvalue() and [*run.dir.glob("checkpoints-*/checkpoint-2")]
    assert trainer.state.global_step == 4


@fault("■ 以后模型的权重换了，重做了 01、02", "03", None)
def _(run):
    with contextlib.suppress(CourseError):
        stopping_at(run, 2)
    file = run.model / "model.safetensors"
    save_file({name: x * 1.01 for name, x in load_file(file).items()}, file)
    this = Course.start(model=str(run.model))
    this.keep("model", run.model)
    with this.making("tokenized", train_rows=20, eval_rows=4) as beside:
        shutil.copytree(run.tokenized, beside, dirs_exist_ok=True)
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)) is None


@fault("训练停在半路就去保存", "03", "没有跑完，不存")
def _(run):
    with patched(train.CourseTrainer, "train", lambda self, **_: None):
        trainer = trained(run, 4)
    yield
    trainer.save_model(str(run.dir.parent / "never"))


@fault("在短训练里按 ■", "03", "没有存")
def _(run):
    yield
    stopping_at(run, 2, save_strategy="no")


@fault("核对的时候按 ■，读回来的适配器还占着位置", "03", None)
def _(run):
    trainer = trained(run, 3)
    first = [p.clone() for n, p in trainer.model.named_parameters() if "default" in n]
    trainer.model.load_adapter(run.checkpoints / "checkpoint-3", adapter_name="reloaded")
    trainer.model.set_adapter("reloaded")
    yield
    trainer.train()
    kept = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    assert all(map(torch.equal, first, kept)) and len(first) == len(kept)


@fault("训练的时候检查点目录删掉了，再按 ■", "03", None)
def _(run):
    forward = train.CourseTrainer.training_step

    def swept(self, *args, **kwargs):
        if self.state.global_step == 1 and run.checkpoints.exists():
            shutil.rmtree(run.checkpoints)
        return forward(self, *args, **kwargs)

    with patched(train.CourseTrainer, "training_step", swept), contextlib.suppress(CourseError):
        stopping_at(run, 3)
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-3"


@fault("坏的检查点步数最大", "03", "停在第 3 步")
def _(run):
    train_then(run, lambda newest: None)
    for step in (90, 91, 92):
        (run.checkpoints / f"checkpoint-{step}").mkdir()
    yield
    try:
        stopping_at(run, 3)
    finally:
        assert (run.checkpoints / "checkpoint-3" / "optimizer.pt").exists()


for name, text in (("recipe.json", "[]"), ("recipe.json", "[" * 100_000)):

    def recipe_of(run, name=name, text=text):
        train_then(run, lambda newest: (run.checkpoints / name).write_text(text))
        yield
        assert train.resume_point(Course.resume(), {}, train.Split(16)) is None

    fault(f"{name} 是 {text[:2]}{'…' * (len(text) > 2)}", "03", None)(recipe_of)

for text in ("{}", "5", '{"global_step": "2", "max_steps": 4}', "[" * 100_000):

    def state_of(run, text=text):
        train_then(run, lambda newest: (newest / "trainer_state.json").write_text(text))
        yield
        assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-1"

    fault(f"检查点的 trainer_state.json 是 {text[:20]}{'…' * (len(text) > 50)}", "03", None)(
        state_of
    )


@fault("一个检查点写到一半断了", "03", None)
def _(run):
    train_then(run, lambda newest: (newest / "optimizer.pt").write_bytes(b"half"))
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-1"


@fault("一个检查点的权重全是 0", "03", None)
def _(run):
    def zero(newest):
        file = newest / "adapter_model.safetensors"
        save_file({name: x * 0 for name, x in load_file(file).items()}, file)

    train_then(run, zero)
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-1"


@fault("一个检查点里有 NaN", "03", None)
def _(run):
    def harm(newest):
        file = newest / "adapter_model.safetensors"
        save_file({name: x * float("nan") for name, x in load_file(file).items()}, file)

    train_then(run, harm)
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-1"


@fault("检查点目录旁边有一份副本，名字带（copy）", "03", None)
def _(run):
    train_then(run, lambda newest: shutil.copytree(newest, newest.with_name("checkpoint-9 (copy)")))
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-2"


@fault("系统的时钟倒退了", "03", None)
def _(run):
    train_then(run, lambda newest: os.utime(newest, (1, 1)))
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)).name == "checkpoint-2"


@fault("recipe.json 坏了", "03", None)
def _(run):
    train_then(run, lambda newest: (run.checkpoints / "recipe.json").write_text("{"))
    yield
    assert train.resume_point(Course.resume(), {}, train.Split(16)) is None
    assert [*run.dir.glob("checkpoints-*/checkpoint-2")]


@fault("参数变了再训练", "03", None)
def _(run):
    train_then(run, lambda newest: None)
    yield
    assert train.resume_point(Course.resume(), {"learning_rate": 1}, train.Split(16)) is None
    assert [*run.dir.glob("checkpoints-*/checkpoint-2")]


@fault("训练出来的适配器全是 NaN", "03", "NaN")
def _(run):
    yield
    with Course.resume().making("adapter") as beside:
        shutil.copytree(run.adapter, beside, dirs_exist_ok=True)
        file = beside / "adapter_model.safetensors"
        save_file({name: x * float("nan") for name, x in load_file(file).items()}, file)
        train.make_portable(beside, "tiny_llama")


def stopping_at(run: Run, step: int, **others) -> None:
    """Train, with ■ pressed in that step."""
    forward = train.CourseTrainer.training_step

    def pressed(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), 2)
        return forward(self, *args, **kwargs)

    with patched(train.CourseTrainer, "training_step", pressed):
        trained(run, 4, **others)


def train_then(run: Run, harm: Callable[[Path], object]) -> None:
    """A training cut off after its second of four checkpoints, the newest of which is then harmed."""
    with contextlib.suppress(CourseError):
        stopping_at(run, 2)
    harm(run.checkpoints / "checkpoint-2")


# --- what strangers send -------------------------------------------------------------------------

EVIL = {
    "清单是空的": (lambda c: c.update({"llama3_lora/SHA256SUMS": b""}), False, "对不上"),
    "清单只写着外面的文件": (
        lambda c: c.update({"llama3_lora/SHA256SUMS": b"0" * 64 + b"  ../../secret"}), False, "对不上"),
    "清单不是 UTF-8": (lambda c: c.update({"llama3_lora/SHA256SUMS": b"\xff\xfe"}), False, "不完整"),
    "没有清单": (lambda c: c.pop("llama3_lora/SHA256SUMS"), False, "不完整"),
    "有清单上没有的文件": (lambda c: c.update({"llama3_lora/vocab.json": b"{}"}), False, "对不上"),
    "一个文件与校验和不符": (
        lambda c: c.update({"llama3_lora/README.md": b"changed"}), False, "与校验和不符"),
    "文件名是 ../": (lambda c: c.update({"../evil": b"x"}), True, "不该有的文件"),
    "文件名是绝对路径": (lambda c: c.update({"/tmp/evil": b"x"}), True, "不该有的文件"),
    "文件名是设备": (lambda c: c.update({"llama3_lora//dev/zero": b"x"}), True, "不该有的文件"),
    "文件名带反斜杠": (lambda c: c.update({"llama3_lora/..\\evil": b"x"}), True, "不该有的文件"),
    "文件在子目录里": (lambda c: c.update({"llama3_lora/a/b": b"x"}), True, "不该有的文件"),
    "隐藏文件": (lambda c: c.update({"llama3_lora/.bashrc": b"x"}), True, "不该有的文件"),
    "名字很长": (lambda c: c.update({"llama3_lora/" + "x" * 300: b"x"}), True, "不该有的文件"),
    "1 MB 解开来 1 GB": (
        lambda c: c.update({"llama3_lora/zeros.bin": bytes(2**30)}), True, "大得不像"),
    "没有适配器": (lambda c: c.pop("llama3_lora/adapter_model.safetensors"), True, "读不出来"),
    "适配器是 pickle": (lambda c: c.update({
        "llama3_lora/adapter_model.bin": c.pop("llama3_lora/adapter_model.safetensors")}), True, "不该有的文件"),
    "适配器是乱码": (lambda c: c.update({
        "llama3_lora/adapter_model.safetensors": b"\xff" * 100}), True, "读不出来"),
}  # fmt: skip


def member(name: str, content) -> Callable[[dict], object]:
    """Exchange a member for `content`, or change a JSON member by a function of it."""

    def change(members: dict) -> None:
        new = content
        if callable(content):
            new = json.dumps(content(json.loads(members[f"llama3_lora/{name}"]))).encode()
        members[f"llama3_lora/{name}"] = new

    return change


for title, name, content in (
    ("设置不是 JSON", "adapter_config.json", b"{"),
    ("设置是一个数组", "adapter_config.json", b"[]"),
    ("设置套了十万层", "adapter_config.json", b"[" * 100_000),
    ("要装入别的程序（auto_mapping）", "adapter_config.json",
     lambda c: c | {"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}}),
    ("不是 LoRA", "adapter_config.json", lambda c: c | {"peft_type": "PROMPT_TUNING"}),
    ("没有写是什么", "adapter_config.json", lambda c: {"r": 8}),
    ("秩写成十亿", "adapter_config.json", lambda c: c | {"r": 10**9}),
    ("秩写成文字", "adapter_config.json", lambda c: c | {"r": "8"}),
    ("秩是负数", "adapter_config.json", lambda c: c | {"r": -8}),
    ("层名是要算很久的正则", "adapter_config.json", lambda c: c | {"target_modules": "(a+)+$"}),
    ("层名里混着正则", "adapter_config.json", lambda c: c | {"target_modules": ["q_proj", "(a|a)*$"]}),
    ("层名是数", "adapter_config.json", lambda c: c | {"target_modules": [1]}),
    ("秩的例外是要算很久的正则", "adapter_config.json",
     lambda c: c | {"rank_pattern": {"(.*.*)*(.*.*)*x$": 8}}),
    ("有的层秩二十万", "adapter_config.json", lambda c: c | {"rank_pattern": {"q_proj": 200_000}}),
    ("要把层抄两千遍", "adapter_config.json", lambda c: c | {"layer_replication": [[0, 4]] * 2000}),
    ("alpha 无穷大", "adapter_config.json", lambda c: c | {"lora_alpha": float("inf")}),
    ("alpha 是 0", "adapter_config.json", lambda c: c | {"lora_alpha": 0}),
    ("alpha 是文字", "adapter_config.json", lambda c: c | {"lora_alpha": "8"}),
    ("要另存别的模块", "adapter_config.json", lambda c: c | {"modules_to_save": ["lm_head"]}),
    ("任务不是聊天", "adapter_config.json", lambda c: c | {"task_type": "SEQ_CLS"}),
    ("分词器要执行程序（auto_map）", "tokenizer_config.json",
     lambda c: c | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ("分词器的设置不是 JSON", "tokenizer_config.json", b"\xff{"),
):  # fmt: skip
    EVIL[title] = (member(name, content), True, "不是普通的 LoRA")
EVIL |= {
    "带着自己的程序": (lambda c: c.update({
        "llama3_lora/config.json": b'{"auto_map": {"AutoConfig": "evil.E"}}', "llama3_lora/evil.py": b"0"}),
        True, "不该有的文件"),
    "聊天模板转不完": (member("chat_template.jinja", LOOP.encode()), True, "写不完"),
    "聊天模板写错了": (member("chat_template.jinja", b"{% for %}"), True, "用不了"),
    "分词器不是 JSON": (member("tokenizer.json", b"{"), True, "分词器用不了"),
    "权重全是 0，压得很小": (
        member("adapter_model.safetensors", bytes(2**25)), True, "大得不像"),
    "解开又压了一遍，多一个目录": (lambda c: c.update({"llama3_lora/": b""}), False, None),
}  # fmt: skip
for title, (change, sums, says) in EVIL.items():

    def evil(run, change=change, sums=sums):
        archive = run.repacked(change, sums)
        yield
        run.unpack(archive)

    fault(f"压缩包：{title}", "带走", says)(evil)

for title, change in (
    ("是 NaN", lambda x: x * float("nan")), ("全是 0", lambda x: x * 0),
    ("是无穷大", lambda x: x / 0),
):  # fmt: skip

    def numbers(run, change=change):
        run.change_weights(change)
        data = run.weights.read_bytes()
        archive = run.repacked(lambda c: c.update({"llama3_lora/adapter_model.safetensors": data}))
        yield
        run.unpack(archive)

    fault(f"压缩包：适配器{title}", "带走", "NaN|全是空的")(numbers)


@fault("压缩包：适配器里没有张量", "带走", "全是空的")
def _(run):
    file = run.dir.parent / "none.safetensors"
    save_file({}, file)
    data = file.read_bytes()
    archive = run.repacked(lambda c: c.update({"llama3_lora/adapter_model.safetensors": data}))
    yield
    run.unpack(archive)


@fault("压缩包：下载断了", "带走", "不完整.*重新下载")
def _(run):
    run.pack.write_bytes(run.pack.read_bytes()[:20000])
    yield
    run.unpack(run.pack)


@fault("压缩包：不是 zip", "带走", "不完整.*重新下载")
def _(run):
    archive = run.dir.parent / "page.zip"
    archive.write_text("<html>404</html>", encoding="utf-8")
    yield
    run.unpack(archive)


@fault("压缩包：有密码", "带走", "不完整")
def _(run):
    data = bytearray(run.pack.read_bytes())
    for place in (m.start() for m in re.finditer(rb"PK\x03\x04|PK\x01\x02", bytes(data))):
        data[place + (6 if data[place + 2] == 3 else 8)] |= 1  # the flag of encryption
    archive = run.dir.parent / "locked.zip"
    archive.write_bytes(data)
    yield
    run.unpack(archive)


@fault("压缩包：要解到的目录里有别的东西", "带走", "有别的东西")
def _(run):
    (run.dir / "local").mkdir()
    (run.dir / "local" / "thesis.txt").write_text("三年", encoding="utf-8")
    yield
    run.unpack(run.pack)


@fault("压缩包：解好一份好的，又来一份坏的", "带走", "NaN")
def _(run):
    home = run.dir / "home"
    infer.unpack(run.pack, home)
    run.change_weights(lambda x: x * float("nan"))
    data = run.weights.read_bytes()
    bad = run.repacked(lambda c: c.update({"llama3_lora/adapter_model.safetensors": data}))
    yield
    infer.unpack(bad, home)


@fault("压缩包：适配器用了 rsLoRA、DoRA", "带走", None)
def _(run):
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    odd = {"use_rslora": True, "use_dora": True, "init_lora_weights": "gaussian"}
    lora = get_peft_model(
        model, LoraConfig(r=2, target_modules=train.SEVEN, task_type="CAUSAL_LM", **odd)
    )
    this = Course.resume("tokenized")
    with this.making("adapter", eval_loss_before=3.0, eval_loss_after=2.0) as beside:
        with train.as_if_trained(lora):
            lora.save_pretrained(beside)
        AutoTokenizer.from_pretrained(run.model).save_pretrained(beside)
        train.make_portable(beside, "tiny_llama")
    with this.making("answers") as file:
        file.write_text("[]", encoding="utf-8")
    with this.making("pack") as file:
        infer.pack(this, file)
    yield
    run.unpack(run.pack)


@fault("压缩包：要解到的目录是一个链接", "带走", "是一个链接")
def _(run):
    outside = run.dir.parent / "outside"
    outside.mkdir()
    (run.dir / "local").symlink_to(outside)
    yield
    run.unpack(run.pack)


@fault("压缩包：要解到的地方是一个文件", "带走", "出错|别的东西")
def _(run):
    (run.dir / "local").write_text("不是目录", encoding="utf-8")
    yield
    run.unpack(run.pack)


@fault("模型目录的名字里有引号和程序", "带走", None)
def _(run):
    nasty = 'x"; import os; os.system("touch evil") # $(touch evil)'
    with patched(Course, "base_name", nasty):
        yield
        card = infer.model_card(Course.resume("adapter"))
    (line,) = re.findall("^base_path = .*$", card, re.M)
    assert isinstance(ast.literal_eval(line.partition(" = ")[2].partition("  #")[0]), str)
    (serve,) = re.findall("^vllm serve .*$", card, re.M)
    assert shlex.split(serve)[2] == nasty


@fault("记录里的成绩和版本是别人编的", "带走", "“适配器”.*03_train_lora")
def _(run):
    file = run.adapter / "made.json"
    record = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(record | {"results": {"name_tuned": [5, 2]}}), encoding="utf-8")
    yield
    Course.resume("adapter")


@fault("scores.json 里是别的东西", "04", None)
def _(run):
    for number, text in enumerate(('{"rank": "8"}', '{"name_base": [1]}', '{"适配器": 1}', "[[[")):
        old = run.dir / f"llama3_lora-{number}"
        old.mkdir()
        (old / "scores.json").write_text(text, encoding="utf-8")
    yield
    infer.score_table(infer.past_runs(Course.resume()))


@fault("模型放掉以后接着聊", "04", "已经放掉")
def _(run):
    chat = infer.Chat(None, None, run.dir / "chats")
    yield
    [*chat.say("你好")]


@fault("压缩包：要解到的目录里有一份旧适配器", "带走", None)
def _(run):
    stale = run.dir / "local" / "llama3_lora"
    stale.mkdir(parents=True)
    (stale / "stale.txt").write_text("旧", encoding="utf-8")
    yield
    assert not (run.unpack(run.pack) / "stale.txt").exists()


@fault("提示词里有三个引号、反引号和标签", "带走", None)
def _(run):
    nasty = '</system>""" PARAMETER x\n```\n# <b>大标题</b> | 表'
    with patched(infer, "SYSTEM_PROMPT", nasty):
        yield
        card = infer.model_card(Course.resume("adapter"))
    assert "<b>" not in card and "\n# <" not in card and card.count("```") % 2 == 0


@fault("聊天里混着微调前的回答和没说完的回答", "04", None)
def _(run):
    chat = infer.Chat(None, None, run.dir / "chats")
    chat.turns = [("一", "微调前"), ("二", "她说的。"), ("三", "没说")]
    chat._hers = [False, True, False]
    yield
    saved = json.loads(chat.save().read_text("utf-8"))
    assert [m["content"] for m in saved[0]["messages"]] == ["二", "她说的。"]


for title, content, says in (
    ("数据集是 0 字节", b"", "空的"), ("数据集是图片", b"\x89PNG\r\n\x1a\n" + bytes(99), "."),
    ("数据集是一篇小说", "从前有座山。\n山里有座庙。\n庙里有个老和尚。\n".encode() * 9, "一篇文字"),
    ("数据集少了一个逗号", b'[{"instruction": "a" "output": "b"}]', "JSON"),
    ("数据集的括号套了十万层", b"[" * 100_000, "."),
    ("数据集里的数有一万位", b'[{"instruction": ' + b"9" * 10_000 + b', "output": "b"}]', "."),
    ("数据集里的回答是空的", b'[{"instruction": "a", "input": "", "output": ""}]', "第 1 条"),
    ("数据集其实是 Excel 的表", b"PK\x03\x04" + bytes(99), "."),
    ("数据集其实是压缩过的（gzip）", b"\x1f\x8b\x08\x00" + bytes(range(99)), "."),
    ("数据集其实是 pickle", b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.", "."),
    ("数据集其实是网页", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "."),
    ("数据集全是空字节", bytes(10_000), "."),
    ("数据集里有孤立的代理字符", b'[{"instruction": "\\ud800", "output": "b"}]' , "."),
    ("数据集里同一个键写了十万遍", b"[{" + b'"instruction": "a", ' * 100_000 + b'"output": 1}]', "."),
    ("数据集是一个 Python 程序", b"import os\nos.system('touch evil')\n" * 20, "."),
    ("数据集里的数是 NaN", b'[{"instruction": NaN, "output": "b"}]', "."),
    ("数据集是一个数", b"1e999", "."),
    ("数据集是一百万个空列表", b"[" + b"[]," * 1_000_000 + b"[]]", "."),
    ("数据集里的对话自己套着自己，一千层", b'{"messages": ' * 1000 + b"[]" + b"}" * 1000, "."),
):  # fmt: skip

    def dataset(run, content=content):
        file = run.dir.parent / "mine.json"
        file.write_bytes(content)
        yield
        reader.load_rows(file)

    fault(title, "01", says)(dataset)


# --- the runner ----------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(thing, name: str, value) -> Iterator[None]:
    former = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, former)


@contextlib.contextmanager
def environ(**values: str) -> Iterator[None]:
    former = os.environ.copy()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)


def contents(folder: Path) -> set[str]:
    """What every file holds, but for what is replaced: the list, locks, checkpoints, a pack unfolded."""
    passing = re.compile(r"manifest\.json|.*\.lock|unfinished.*|checkpoints|local")
    return {
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
        and not any(passing.fullmatch(part) for part in file.relative_to(folder).parts)
    }  # fmt: skip


def strike(fault: Fault, whole: Path, folder: Path) -> tuple[str | None, int]:
    """Let `fault` strike a copy of the run in `whole`.

    Returns what was said, None if nothing was, and how many files lay there and still do.

    Raises AssertionError where it was not what the fault `says`, or where something was lost.
    """
    with environ(HUANHUAN_OUTPUT=str(folder / "run")), contextlib.redirect_stdout(io.StringIO()):
        shutil.copytree(whole, folder / "run")
        run, said = Run(folder / "run"), None
        course_of_events = fault.strike(run)
        next(course_of_events)
        there, outside = contents(run.dir), set(folder.iterdir())
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        memory, began = course.peak_memory_gib(), time.process_time()
        try:
            for _ in course_of_events:
                raise AssertionError("a fault yields once")
        except CourseError as error:
            said = str(error)
        assert (said is None) == (fault.says is None), said
        assert said is None or re.search(fault.says, said, re.S), said
        assert fault.where == "03" or time.process_time() - began <= 5, "too long"  # 03 trains
        assert course.peak_memory_gib() - memory <= 1, "too much memory"
        kept = there & contents(run.dir)
        assert kept == there, "something that lay there is gone"
        assert set(folder.iterdir()) == outside, "something was written elsewhere"
    return said, len(kept)


def elsewhere_too(said: str, folder: Path) -> str:
    """What was said, without what differs from machine to machine."""
    said = re.sub(f"{re.escape(str(folder))}/\\d+|{re.escape(str(ROOT))}", "…", said)
    return re.sub(r"(进程|只剩) [\d.]+( \wiB)?(，[\d:]+ 起)?", r"\1 …", said)


def main() -> None:
    """Strike with every fault; write what was said beside this file, and the counts into README.md."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with environ(HUANHUAN_PROFILE="cpu-tiny"), contextlib.redirect_stdout(io.StringIO()):
            make_run(folder / "whole")
        lines = ["| 出了什么事 | 在哪里 | 课程怎么说 | 还在的文件 |", "|---|---|---|---|"]
        spoken: dict[str, list[bool]] = {}
        for number, fault in enumerate(FAULTS):
            with environ(HUANHUAN_PROFILE="cpu-tiny"):
                said, kept = strike(fault, folder / "whole", folder / str(number))
            spoken.setdefault(fault.where, []).append(said is not None)
            told = infer.plain(elsewhere_too(said or "接着运行，结果一样", folder))
            told = told[:90] + "……" * (len(told) > 90)
            kind = fault.kind.replace("|", " ")
            lines.append(f"| {kind} | {fault.where} | {told} | {kept} |")
    readme = ROOT / "tests" / "faults" / "README.md"
    readme.write_text(
        "# 出了错会怎样\n\n`python tests/faults/faults.py` 写成这张表。出事时在运行目录里的每个文件，事后都要还在"
        "（同一个名字，或者带日期的名字），一个也不能少；最后一列是它们的个数，内容相同的算一个。\n\n"
        + "\n".join(lines)
        + "\n",
        encoding="utf-8",
    )
    rooms = ["| 在哪里 | 试过的错 | 一句话说清楚 | 不受影响，接着运行 |", "|---|---|---|---|"]
    for where, said in sorted(spoken.items()):
        rooms.append(f"| {where} | {len(said)} | {sum(said)} | {len(said) - sum(said)} |")
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    text = "\n".join([f"{head}{MARKS[0]}", *rooms, f"{MARKS[1]}{tail}"])
    readme.write_text(text, encoding="utf-8")
    print(f"{len(FAULTS)} faults")


if __name__ == "__main__":
    main()
