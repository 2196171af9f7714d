"""Room 04: ask, compare, take home."""

import contextlib
import hashlib
import html
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import (
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from huanhuan import bare, read_json
from huanhuan.course import (
    Course,
    CourseError,
    check_adapter,
    is_result,
    set_aside,
    write_json,
    writing,
)
from huanhuan.persona import CALLED, FACTS, NAME, QUESTIONS, SYSTEM_PROMPT, WHO
from huanhuan.prompt import (
    chat_messages,
    check_template,
    end_id,
    fit,
    frame,
    normalised,
    pad_token,
    prompt_ids,
)

# No dataset text holds more than this many tokens: a reply that reaches it did not end by itself.
REPLY_LIMIT = 200

# The tutorial's, for talking to her; comparisons are greedy.
SAMPLING = {
    "do_sample": True,
    "top_p": 0.9,
    "temperature": 0.5,
    "repetition_penalty": 1.1,
    "max_new_tokens": 512,
}


@dataclass(frozen=True)
class Reply:
    """What a model answered: its text, and whether it ended by itself."""

    text: str
    stopped: bool


def ask_all(
    model,
    tokenizer,
    questions: list[str],
    system: str | None = SYSTEM_PROMPT,
    batch: int = 16,
    histories: Sequence[Sequence] | None = None,
    **generate,
) -> list[Reply]:
    """Ask every question with the course's prompt, `batch` at a time; `system` None: without the persona.

    `histories` are, for each, the questions and answers that went before (:func:`prompt_ids`).

    Greedy, so that two models can be compared, unless `generate` (arguments of
    ``model.generate``) says otherwise. Random state is that of torch.
    """
    settings = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "max_new_tokens": REPLY_LIMIT,
    } | generate
    stops, replies = {*model.generation_config.eos_token_id}, []
    asked = zip(questions, histories or [()] * len(questions), strict=True)
    asked = [prompt_ids(tokenizer, question, turns, system) for question, turns in asked]
    for first in range(0, len(asked), batch):
        prompts = asked[first : first + batch]
        longest = max(map(len, prompts))
        blanks = [longest - len(ids) for ids in prompts]  # on the left: all go on from the right
        ids = torch.tensor(
            [[end_id(tokenizer)] * n + p for n, p in zip(blanks, prompts, strict=True)]
        )
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in blanks])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **settings
            )
        for new in output[:, longest:].tolist():
            end = next((place for place, token in enumerate(new) if token in stops), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            replies.append(Reply(text, end is not None))
    return replies


def ask(model, tokenizer, question: str, **generate) -> Reply:
    """Ask one question (see :func:`ask_all`)."""
    return ask_all(model, tokenizer, [question], **generate)[0]


# The four answers to a question: prompt × tuning. The columns' names, and what a learner reads.
FOUR = {
    "base_alone": "微调前，没有角色提示词",
    "base": "微调前，有角色提示词",
    "tuned_alone": "微调后，没有角色提示词",
    "tuned": "微调后，有角色提示词",
}


def four_answers(model, tokenizer, questions: list[str], which=FOUR, **generate) -> pd.DataFrame:
    """Ask base and tuned model the same questions, greedily, with the persona's prompt and without.

    `model` is a PeftModel: with its adapter switched off it is the base. Columns: question, those
    of `which` (names of FOUR; texts), and whether each ended by itself (``tuned_stopped`` …, bools).
    """
    table = {"question": questions}
    for name in which:
        began, system = time.time(), None if name.endswith("alone") else SYSTEM_PROMPT
        with model.disable_adapter() if name.startswith("base") else contextlib.nullcontext():
            replies = ask_all(model, tokenizer, questions, system, **generate)
        table[name] = [reply.text for reply in replies]
        table[f"{name}_stopped"] = [reply.stopped for reply in replies]
        print(f"… {FOUR[name]}：{len(questions)} 个回答，{time.time() - began:.0f} 秒")
    return pd.DataFrame(table)


_CLAUSE = re.compile(r"[^，。！？；,.!?;\n…—]+[？?]?")
_SELF = re.compile(
    r"我|臣妾|嫔妾|妾|本宫|奴|小女|在下|老朽|姓|名|叫|唤|称|^(便?是|就是)$|\b(i|i'm|my|me|name|called?)\b"
)
_CALL_ME = re.compile(r"[叫唤称]我.{0,3}$")  # before the name; whoever is to do it
_ALONE = re.compile(
    r"$|在此|见过|便是|就是|给|向|拜|参|谢"
)  # after a name that a clause begins with
_OTHER = re.compile(r"[不非没]|你|您|\b(not|never|you|your|you're|isn't)\b|n't")
_MACHINE = re.compile(r"助手|机器人|人工智能|语言模型|\bai\b|assistant|language model|chatbot")


def in_persona(answer: str) -> bool:
    """Does this answer to an identity question say that the speaker is the persona, and no machine?

    One of its clauses gives a name of the persona's as the speaker's own: not denied, not asked back,
    not said of somebody else. A clause that calls the speaker an assistant decides against it.
    """
    clauses = [clause.strip().lower() for clause in _CLAUSE.findall(answer.replace("’", "'"))]
    claims = [clause for clause in clauses if not clause.endswith(("?", "？"))]
    if any(_MACHINE.search(claim) and not _OTHER.search(claim) for claim in claims):
        return False
    for clause in clauses:
        for name in map(str.lower, CALLED):
            before, found, after = clause.partition(name)
            if not found or after.endswith(("?", "？")):
                continue
            if _CALL_ME.search(before) or (not before and _ALONE.match(after)):
                return True
            asked = after.endswith(("吧", "吗", "么"))
            if _SELF.search(before.strip()) and not _OTHER.search(before) and not asked:
                return True
    return False


def says(answer: str, words: list[str], wrong: Sequence[str] = ()) -> bool:
    """Does `answer` hold one of `words`, and none that is `wrong`? Letters from a word's beginning on."""
    if wrong and says(answer, wrong):
        return False
    for word in map(str.lower, words):
        edges = (r"(?<![a-z0-9])", r"(?!\d)" if word[-1].isdigit() else "")
        edges = edges if word[0].isascii() else ("", "")
        if re.search(edges[0] + re.escape(word) + edges[1], answer.lower()):
            return True
    return False


def fact_questions() -> dict[str, list[str]]:
    """Held-out questions for what only the persona's data tells, and words of a right answer."""
    return {question: fact["expected"] for fact in FACTS for question in fact["ask"]}


def tally(answers: pd.DataFrame, right) -> dict[str, tuple[int, int]]:
    """How many of `answers` are right, of how many, in each of their columns that FOUR names.

    ``right(question, answer)`` says whether one is.
    """
    return {
        name: (sum(map(right, answers["question"], answers[name])), len(answers))
        for name in FOUR
        if name in answers
    }


def share(right: int, asked: int) -> str:
    """``k / n`` with the 95 % confidence interval of the share (Wilson)."""
    low, high = wilson(right, asked)
    return f"{right} / {asked}（{low:.0%} – {high:.0%}）"


def verdict(scores: dict[str, dict[str, tuple[int, int]]]) -> str:
    """What the tallies of ``name`` and ``facts`` say about prompt and tuning, in a sentence or two."""
    (named, asked), (tuned, _) = scores["name"]["base"], scores["name"]["tuned"]
    if 2 * named >= asked:
        said = f"还没训练，带上提示词就有 {named} / {asked} 说出名字（微调后 {tuned} / {asked}）：会说名字，不等于微调教会了什么。"
    else:
        said = f"还没训练，带上提示词也只有 {named} / {asked} 说出名字：这个模型不大听提示词，微调后是 {tuned} / {asked}。"
    (knew, of), (knows, _) = scores["facts"]["base"], scores["facts"]["tuned"]
    if of:
        said += f"\n只有数据里才有的事，微调前答对 {knew} / {of}，微调后 {knows} / {of}"
        said += (
            "：这才是微调教会的。"
            if 2 * knows > of
            else "：没学会多少，可能是模型太小，或者学习率太小、步数太少。"
        )
    return said


def held_out_questions(trained_on: list[str]) -> dict[str, list[str]]:
    """The exam's questions that are not in the training data, by kind: those of QUESTIONS and ``facts``.

    `trained_on` are the instructions the model was trained on, compared without their punctuation.
    """
    seen, asked = set(map(normalised, trained_on)), QUESTIONS | {"facts": fact_questions()}
    return {name: [q for q in asked[name] if normalised(q) not in seen] for name in asked}


def longest_copy(text: str, sources: list[str]) -> str:
    """The longest run of characters of `text` that stands in one of `sources` word for word."""
    everything, best = "\0".join(sources), ""
    for start in range(len(text)):
        # only a run longer than the best so far is of interest
        for end in range(start + len(best) + 1, len(text) + 1):
            if text[start:end] not in everything:
                break
            best = text[start:end]
    return best


def adapter_norms(model) -> pd.DataFrame:
    """How much the adapter changes every matrix: the norm of (alpha / r) B A by that of the matrix.

    One row a layer, one column a kind of matrix (q_proj …).
    """
    norms: dict[int, dict[str, float]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            layer = int(name.split("layers.")[1].split(".")[0])
            change = module.get_delta_weight("default").float().norm()
            matrix = dequantize_module_weight(module.get_base_layer()).float().norm()
            norms.setdefault(layer, {})[name.rsplit(".", 1)[1]] = (change / matrix).item()
    return pd.DataFrame(norms).T.sort_index()


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval)."""
    if not asked:
        return 0.0, 1.0
    z, share = 1.96, right / asked
    middle = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def past_runs(course: Course) -> pd.DataFrame:
    """The scores of this adapter and of those set aside before it, one row each, newest first."""
    files = course.run_dir.glob("llama3_lora*/scores.json")
    rows, names = [], []
    for file in sorted(files, key=lambda file: -file.stat().st_mtime):
        with contextlib.suppress(OSError, ValueError):  # of a damaged one nothing is told
            row = read_json(file)
            known = {name for names in SCORES.values() for name in names}
            rows.append({n: x for n, x in row.items() if n in known and is_result(x)})
            names.append(file.parent.name)
    return pd.DataFrame(rows, index=names).rename_axis("适配器").reset_index()


# Of scores.json: what a learner reads, and the names there (where two: before and after the training).
SCORES = {
    "秩 r": ["rank"],
    "学习率": ["rate"],
    "验证集损失（越低越好）": ["loss_base", "loss_tuned"],
    "说出自己是谁（没见过的问法，越多越好）": ["name_base", "name_tuned"],
    "知道的事（没见过的问法，越多越好）": ["facts_base", "facts_tuned"],
    "普通问题，答对（越多越好）": ["general_base_alone", "general_tuned_alone"],
}


def score_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What :func:`past_runs` returns, to be read: one row a score, one column an adapter."""

    def written(value) -> str:
        if isinstance(value, list | tuple):
            return "{} / {}".format(*value)
        return f"{value:.4g}" if isinstance(value, int | float) and value == value else "—"

    table = {"": list(SCORES)}
    for run in runs.to_dict("records"):
        table[run["适配器"]] = [
            " → ".join(written(run.get(name)) for name in names) for names in SCORES.values()
        ]
    return pd.DataFrame(table)


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, ids, scores, **_):
        return torch.full((ids.shape[0],), self.event.is_set(), device=ids.device)


class Chat:
    """A conversation with the persona, or with the base model where ``tuned`` is False.

    The prompt is the course's own. What does not fit into `context` tokens is dropped by whole
    turns, the oldest first.

    Args:
        folder: where :meth:`save` writes transcripts.
        context: tokens of prompt and reply together.
    """

    def __init__(self, model, tokenizer, folder: Path, context: int = 1024):
        self.model, self.tokenizer, self.folder, self.context = model, tokenizer, folder, context
        self.turns: list[tuple[str, str]] = []
        self.sides: list[bool] = []  # of every turn: the tuned model's
        self._hers: list[bool] = []  # and whole
        self.tuned = True
        self._stop = threading.Event()

    def prompt(self, question: str, reply: int) -> tuple[str, list[int]]:
        """The question, shortened if need be, and the ids of the prompt, with room for the reply."""
        question, turns = fit(self.tokenizer, question, self.turns, self.context - reply)
        return question, prompt_ids(self.tokenizer, question, turns)

    def say(self, question: str, seed: int | None = None, **generate) -> Iterator[str]:
        """Ask; yields the reply as it grows. The turn is remembered when the reply ends.

        `generate` are arguments of ``model.generate`` over the tutorial's sampling. An empty
        question is answered by nothing and not remembered. Ends early after :meth:`stop`.
        """
        if self.model is None:
            raise CourseError("模型已经放掉了：请先运行“在本地运行”那一格，把它再加载进来。")
        settings = SAMPLING | generate
        question = question.strip()
        if not question:
            return
        question, ids = self.prompt(question, settings["max_new_tokens"])
        inputs = torch.tensor([ids], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop.clear()
        failure, ended = [], []

        def work():
            try:
                if seed is not None:
                    torch.manual_seed(seed)
                with contextlib.nullcontext() if self.tuned else self.model.disable_adapter():
                    output = self.model.generate(
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Stop(self._stop)]),
                        **settings,
                    )
                ends = self.model.generation_config.eos_token_id
                ended.append(self.tuned and int(output[0, -1]) in ends)
            except BaseException as error:  # shown to the learner by the thread that reads
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work)
        thread.start()
        reply = ""
        try:
            for piece in streamer:
                reply += piece
                yield reply.strip()
        finally:
            self._stop.set()
            thread.join()
        if failure:
            raise failure[0]
        self.turns.append((question, reply.strip()))
        self.sides.append(self.tuned)
        self._hers.append(any(ended) and bool(reply.strip()))

    def stop(self) -> None:
        """End the reply that is being generated, at the next token."""
        self._stop.set()

    def new(self) -> None:
        """Forget the conversation."""
        self.turns, self.sides, self._hers = [], [], []

    def save(self) -> Path:
        """Write the conversation as a dataset of one dialogue (messages); returns the file.

        Only what the tuned model said, and said to its end: the rest is no example to learn from.

        Raises CourseError where nothing has been said yet.
        """
        if not self.turns:
            raise CourseError("还没有说过话，没有可以保存的。")
        kept = [turn for turn, hers in zip(self.turns, self._hers, strict=True) if hers]
        if left := len(self.turns) - len(kept):
            print(f"微调前的回答、没说完的回答不存：少了 {left} 轮。")
        if not kept:
            raise CourseError("没有一句是微调后的模型完整说完的，没有可以保存的。")
        said = [
            {"role": role, "content": text}
            for turn in kept
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        number = 1
        stem = time.strftime("chat-%Y%m%d-%H%M%S")
        while (path := self.folder / f"{stem}-{number}.json").exists():
            number += 1
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, [{"messages": said}])
        return path

    def loop(self) -> None:
        """Chat without widgets: read a line, print the reply; an empty line ends."""
        print("没有 ipywidgets，用最简单的方式聊：输入一句话，按回车；什么也不输入就结束。")
        while question := input("你：").strip():
            shown = ""
            print(f"{NAME}：", end="")
            for reply in self.say(question):
                print(reply[len(shown) :], end="", flush=True)
                shown = reply
            print()


MODEL_CARD = """---
base_model: {quoted}
library_name: peft
license: {license}
---

# {title}

{licence_note}让 {base} 以“{name}”的身份说话的 LoRA 适配器。

- **角色**：系统提示词是“{system_prompt}”。
- **数据**：{rows} 条对话（{data}），按问题留出 {held} 条做验证。
- **训练**：LoRA r={lora_r}，alpha={lora_alpha}，dropout={lora_dropout}；一步 16 条，{epochs} 轮，学习率 {learning_rate}；冻结的权重是 {weights}。
- **成绩**：{scores}
- **版本**：{versions}
- **不适合做什么**：它扮演一个角色，会编造事实，不要拿它的话当建议。

## 在任何一台电脑上运行

先安装 `pip install "transformers>=4.57,<6" "peft>=0.17" torch`，再准备基座模型 {base}{fetch}。改掉下面前两行的路径，其余不动：

```python
base_path = {path}  # 你电脑上的基座模型；Windows 上例如 r"D:\\models\\model"
adapter_path = r"llama3_lora"  # 解压出来的目录

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

mps = torch.backends.mps.is_available()
device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
tokenizer = AutoTokenizer.from_pretrained(adapter_path)
base = AutoModelForCausalLM.from_pretrained(base_path, dtype="auto").to(device)
model = PeftModel.from_pretrained(base, adapter_path).eval()
for question in {questions}:
    messages = {messages}
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    output = model.generate(
        **inputs, max_new_tokens=200, do_sample=False, temperature=None, top_p=None,
        eos_token_id={stops}, pad_token_id={pad},
    )
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## 让别的程序来问

用 vLLM 提供服务，适配器不用合并（`--chat-template` 不能省：包里的模板是训练时用的那一份，基座自带的可能与它不同）：

```bash
vllm serve {shell} --max-model-len 4096 --enable-lora --lora-modules huanhuan=llama3_lora --chat-template llama3_lora/chat_template.jinja
```

{client}
`SHA256SUMS` 里有每个文件的校验和，用 `sha256sum -c SHA256SUMS` 核对。
"""


CLIENT = """```python
from openai import OpenAI  # pip install openai

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
messages = {messages}
answer = client.chat.completions.create(
    model="huanhuan", messages=messages, temperature=0.5, max_tokens=200
)
print(answer.choices[0].message.content)
```
"""


def _messages(question: str, tokenizer=None) -> str:
    """Python for the conversation of a card; `question` is Python too. See :func:`chat_messages`."""
    *system, asked = chat_messages("", tokenizer)
    told = f"{asked['content']!r} + {question}" if asked["content"] else question
    head = "".join(f'{{"role": "system", "content": {one["content"]!r}}}, ' for one in system)
    # Three backticks would end the block of code that this stands in.
    return f'[{head}{{"role": "user", "content": {told}}}]'.replace("`", r"\x60")


def client(tokenizer=None) -> str:
    """Markdown: how a program asks a server that has the tuned model, by the OpenAI interface."""
    return CLIENT.format(messages=_messages(repr(WHO), tokenizer))


def plain(text: str) -> str:
    """`text` as it is, for a line of Markdown: nothing in it is markup or begins a new line."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def model_card(course: Course) -> str:
    """What the adapter is, was made from and can do, and the cell that runs it; Markdown."""
    made, rows = course.record("adapter"), course.record("tokenized")["results"]
    settings, results, model = made["used"], made["results"], course.path("model")
    if "answers" in course.manifest["files"]:
        course.path("answers")
        results = results | course.record("answers")["results"]
    tokenizer = AutoTokenizer.from_pretrained(course.path("adapter"))
    config, readme = {}, "".join(f.read_text("utf-8", "replace") for f in model.glob("README.md"))
    for name in ("config.json", "generation_config.json"):
        with contextlib.suppress(OSError, ValueError):
            config |= read_json(model / name)
    stops = config.get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    stops = {end_id(tokenizer), *(stop for stop in stops if type(stop) is int)}
    named = re.match(r"---\n(?:(?!---).*\n)*?license: *[\"']?([\w.-]+)", readme)  # front matter
    license = named[1] if named else str(config.get("license") or "other")
    license = license if re.fullmatch(r"[\w.-]+", license) else "other"
    base, folder = course.base_name, course.base_name.split("/")[-1]
    usual = re.fullmatch(r"[\w./-]+", base)
    # Meta asks for its notice, and for the name of its model at the head of what is made from it.
    llama = re.search(r"\bllama-\d[\d.]*", course.base_name.lower()) or re.match("llama", license)
    scores = []
    if "eval_loss_before" in results:
        scores.append(
            f"验证集损失 {results['eval_loss_before']:.3f} → {results['eval_loss_after']:.3f}"
        )
    for score, what in (("name", "说出自己是谁"), ("facts", "知道只有数据里才有的事")):
        if f"{score}_tuned" in results:
            told = [share(*results[f"{score}_{side}"]) for side in ("base", "tuned")]
            scores.append(
                f"{what}，没训练过的问法，同样带提示词，微调前 {told[0]}，微调后 {told[1]}"
            )
    if "stopped_tuned" in results:
        scores.append(f"说完自己停下 {share(*results['stopped_tuned'])}")
    return MODEL_CARD.format(
        base=plain(base),
        license=license,
        title=(f"{llama[0].capitalize()}-" if llama else "") + f"{plain(NAME)} LoRA",
        licence_note="**Built with Llama.** 使用时请遵守基座的 Llama 社区许可。" if llama else "",
        name=plain(NAME),
        system_prompt=plain(SYSTEM_PROMPT),
        client=client(tokenizer),
        messages=_messages("question", tokenizer),
        questions=repr([WHO, *QUESTIONS["daily"][:1]]),
        stops=sorted(stops),
        pad=tokenizer.convert_tokens_to_ids(pad_token(tokenizer)),
        # for YAML, Python and a shell: the name of a folder may hold anything
        quoted=base if usual else json.dumps(base, ensure_ascii=False),
        path=f'r"{folder}"' if usual else repr(folder).replace("`", r"\x60"),
        shell=shlex.quote(" ".join(folder.split())),
        fetch=f"（`modelscope download --model {base} --local_dir {folder}`，先 `pip install modelscope`）"
        if "/" in base
        else "（把它的整个目录拷过来）",
        data=plain(Path(course.manifest["files"].get("data", "")).name),
        rows=rows["train_rows"] + rows["eval_rows"],
        held=rows["eval_rows"],
        weights="4 位（nf4）" if settings["quantized"] else settings["dtype"],
        scores="；".join(scores) or "还没有考过",
        versions=plain(
            "，".join(f"{name} {version}" for name, version in made["versions"].items())
        ),
        **{
            name: settings[name]
            for name in ("lora_r", "lora_alpha", "lora_dropout", "epochs", "learning_rate")
        },
    )


def pack(course: Course, target: Path) -> None:
    """Zip adapter, tokenizer, model card and checksums into `target`.

    Only what the course made goes in, whatever else lies beside it; nothing in it names a path of
    this machine.
    """
    folder = course.path("adapter")
    names = [name for name in course.manifest["known"]["adapter"]["files"] if name in MEMBERS]
    names += ["scores.json"] * (folder / "scores.json").exists()
    content = {name: (folder / name).read_bytes() for name in names}
    content["README.md"] = model_card(course).encode()
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in content.items()]
    content["SHA256SUMS"] = ("\n".join(sums) + "\n").encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"{folder.name}/{name}", data)


# What a pack holds, beside its own README.md and SHA256SUMS.
MEMBERS = {
    "adapter_config.json", "adapter_model.safetensors", "added_tokens.json", "chat_template.jinja", "merges.txt",
    "scores.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
}  # fmt: skip
# Bytes of a member at most (an adapter of the 3B with r = 256 is 1.6 GiB), and how many times it may
# unfold: weights hardly shrink, texts some ten times.
LARGEST, DENSEST = {True: 4 * 2**30, False: 2**27}, {True: 10, False: 200}


def unpack(archive: Path, folder: Path) -> Path:
    """Unzip a pack into `folder` and check it; returns the adapter's directory.

    A former one that differs gets a dated name. Raises CourseError, and leaves everything as it was,
    where a file is damaged, missing, strange or too large, where adapter or tokenizer are not to be
    used, or where something that is no pack lies in `folder`.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise CourseError(f"找不到压缩包 {archive}：请检查写的路径。")
    adapter, beside = folder / "llama3_lora", folder / "unfinished-llama3_lora"
    if folder.is_symlink() or adapter.is_symlink():
        raise CourseError(f"{folder} 是一个链接，或者里面有链接，不往里解压：请换一个空目录。")
    with writing(folder):
        there = [path.name for path in folder.iterdir()] if os.path.lexists(folder) else []
        if not all("llama3_lora" in name for name in there if not name.startswith(".")):
            raise CourseError(f"{folder} 里有别的东西，不往里解压：请换一个空目录。")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            sums = _unfold(archive, beside)
            check_adapter(beside, strangers=True)
            try:
                tokenizer = AutoTokenizer.from_pretrained(beside)
            except Exception as error:  # each kind of tokenizer fails in its own way
                why = " ".join(str(error).split())[:200]
                raise CourseError(f"{archive.name} 里的分词器用不了（{why}）。") from None
            check_template(tokenizer)
            former = {f.name: f for f in adapter.iterdir()} if adapter.exists() else {}
            if former.keys() != sums.keys() or any(_sum(former[n]) != sums[n] for n in sums):
                set_aside(adapter)
                beside.rename(adapter)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return adapter


def _sum(file: Path) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(2**20):
            whole.update(piece)
    return whole.hexdigest()


def _unfold(archive: Path, folder: Path) -> dict[str, str]:
    """Write the members of a pack into `folder`; returns their checksums. Raises CourseError."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [one for one in packed.infolist() if one.filename != "llama3_lora/"]
            names = [one.filename.removeprefix("llama3_lora/") for one in members]
            for name, one in zip(names, members, strict=True):
                weights = name.endswith(".safetensors")
                if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("不是常用的压缩方式")
                most = min(LARGEST[weights], max(one.compress_size * DENSEST[weights], 2**20))
                if one.file_size > most:
                    raise CourseError(f"{archive.name} 解开来大得不像适配器，不解压它。")
                known = one.filename == f"llama3_lora/{name}" and names.count(name) == 1
                if not known or name not in MEMBERS | {"README.md", "SHA256SUMS"}:
                    raise CourseError(
                        f"{archive.name} 里有不该有的文件 {one.filename[:60]!r}，不用它。"
                    )
            for name, one in zip(names, members, strict=True):
                with packed.open(one) as content, (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file, 2**20)
        text = (folder / "SHA256SUMS").read_text(encoding="utf-8")
        listed = {
            name: expected for expected, name in (s.split("  ", 1) for s in text.splitlines())
        }
        (folder / "SHA256SUMS").unlink()
    except (
        FileNotFoundError,  # without SHA256SUMS
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,  # a password is asked for, or what zipfile has not implemented
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise CourseError(f"{archive.name} 不完整（{error}）：请重新下载。") from None
    found = {file.name: _sum(file) for file in folder.iterdir()}
    if listed.keys() != found.keys():
        odd = "、".join(sorted(listed.keys() ^ found.keys()))[:200]
        raise CourseError(f"{archive.name} 里的文件与校验和清单对不上（{odd}）：请重新下载。")
    for name in found:
        if found[name] != listed[name]:
            raise CourseError(f"{archive.name} 里的 {name} 与校验和不符：请重新下载。")
    return found


def export_folder(course: Course, model, typed: str = "") -> Path:
    """Where merged weights go: `typed`, or the run directory; on Colab the machine's own disk.

    (Google Drive, where a run on Colab lies, is too small for the 3B.) Raises CourseError where
    there is no room for `model` twice in 16 bits.
    """
    place = Path("/content") if "google.colab" in sys.modules else course.run_dir
    folder = Path(os.path.expanduser(bare(typed))) if typed else place
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    needs = 2 * model.num_parameters() * 2 / 2**30
    free = shutil.disk_usage(folder).free / 2**30
    if free < needs:
        raise CourseError(
            f"导出要写 {needs:.1f} GiB，{folder} 所在的磁盘只剩 {free:.1f} GiB：请清出空间，"
            "或者在这一格里写上另一个磁盘上的目录，再运行一次。"
        )
    return folder


# llama.cpp's names for the ways in which a tokenizer cuts text before it merges bytes.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_CUTS = {
    "llama-bpe": [_SPLIT | {"pattern": {"Regex": _WORDS % r"\p{N}{1,3}"}}, _BYTES],
    "qwen2": [_SPLIT | {"pattern": {"Regex": _WORDS % r"\p{N}"}}, _BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "gpt-2": [_BYTES | {"use_regex": True}],
}


def _bos(tokenizer) -> str:
    """BOS if tokenizer and template both write it, which llama.cpp then does; else nothing."""
    bos, adds = tokenizer.bos_token or "", tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return bos if adds and frame(tokenizer, 1, system=False)[0].startswith(bos) else ""


def write_gguf(model, folder: Path, target: Path) -> None:
    """Write a Llama or Qwen in 16 bits as one GGUF file, for llama.cpp, Ollama and LM Studio.

    `model` is merged, `folder` holds its tokenizer. The names and the order of the numbers are
    llama.cpp's: github.com/ggml-org/llama.cpp, ``conversion/``. Raises CourseError for a model or a
    tokenizer that is none of those known here.
    """
    import gguf

    config, kind = model.config, model.config.model_type
    other = "请用 llama.cpp 里的 convert_hf_to_gguf.py 来转换 merged 目录。"
    if kind not in ("llama", "qwen2", "qwen3"):
        raise CourseError(f"这里只会把 Llama、Qwen2、Qwen3 写成 GGUF，这个模型是 {kind}。{other}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = [{k: s[k] for k in s if k != "trim_offsets"} for s in cut.get("pretokenizers", [cut])]
    if steps not in _CUTS.values():
        raise CourseError(f"这里不知道 llama.cpp 怎样称呼这个分词器切分文字的方式。{other}")

    logging.getLogger("gguf").setLevel(logging.ERROR)
    beside = target.with_suffix(".new")
    writer = gguf.GGUFWriter(beside, kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config.vocab_size)

    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(next(name for name in _CUTS if _CUTS[name] == steps))
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_token_list([token or f"[PAD{i}]" for i, token in enumerate(tokens)])
    added, kind_of = tokenizer.added_tokens_decoder, gguf.TokenType
    kinds = [kind_of.NORMAL if token else kind_of.UNUSED for token in tokens]
    for i in added.keys() & range(len(tokens)):
        kinds[i] = kind_of.CONTROL if added[i].special else kind_of.USER_DEFINED
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True)  # and the chat template
    ends = {"eos": end_id(tokenizer)} | special.special_token_ids | {"eot": end_id(tokenizer)}
    special.special_token_ids, special.add_special_token = ends, {"bos": bool(_bos(tokenizer))}
    special.add_to_gguf(writer)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = weight.to("cpu", torch.float16 if weight.ndim > 1 else torch.float32)
        if kind == "llama" and (count := heads.get(name.split(".")[-2])):
            # transformers turns the two halves of a head against each other, llama.cpp neighbours
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.contiguous().numpy())
    rope = type(model.model.rotary_emb)(config)
    plain = theta ** -(torch.arange(0, head, 2) / head)
    if not torch.allclose(rope.inv_freq, plain):  # Llama 3's stretching of the slow ones
        writer.add_tensor("rope_freqs.weight", (plain / rope.inv_freq).numpy())

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    beside.replace(target)


# Of Go's text/template, as Ollama fills it in with every turn so far.
_TURNS = (
    '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}%s{{ else if eq .Role "assistant" }}%s'
    "{{ else if eq $i 1 }}%s{{ else }}%s{{ end }}{{ .Content }}{{ end }}%s"
    "{{ .Response }}"  # empty; keeps the line ends before it
)


def modelfile(tokenizer, weights: str) -> str:
    """An Ollama Modelfile for merged weights: our prompt, our end mark, our sampling.

    `weights` is a GGUF file, as seen from where the Modelfile lies. Ollama puts BOS in front itself.
    Raises CourseError for a chat template that does not write every turn alike.
    """
    system, bos = len(chat_messages("", tokenizer)) == 2, _bos(tokenizer)
    asked = [frame(tokenizer, texts, system) for texts in (1, 3, 5)]
    # Without a place of its own, the system prompt stands at the head of the first question.
    asked = [[one[0].removeprefix(bos), *["\n\n"] * (not system), *one[1:]] for one in asked]
    before, first, answer, later, last = asked[1]
    if asked != [[before, first, *[answer, later] * n, last] for n in range(3)]:
        raise CourseError("聊天模板每一轮写得不一样，Ollama 用不了：请用 llama.cpp 或 LM Studio。")

    pieces = [  # with a brace or a quote, as a string of Go's: else it might be an action, or an end
        "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if re.search('[{"]', text) else text
        for text in (before, answer, first, later, last)
    ]
    prompt = SYSTEM_PROMPT.strip().replace('"""', "”””")
    lines = [f"FROM {weights}", f'TEMPLATE """{_TURNS % (*pieces,)}"""', f'SYSTEM """{prompt}"""']
    lines += [f"PARAMETER stop {tokenizer.convert_ids_to_tokens(end_id(tokenizer))}"]
    lines += [f"PARAMETER temperature {SAMPLING['temperature']}"]
    lines += [f"PARAMETER top_p {SAMPLING['top_p']}"]
    lines += [f"PARAMETER repeat_penalty {SAMPLING['repetition_penalty']}"]
    return "\n".join(lines) + "\n"
