"""Exercises that answer back: what a learner wrote is judged, and a mistake gets a hint of its own.

An exercise is a function of the answer and of what the notebook hands it (tokenizer, data, profile
…), so every number is worked out from the learner's own run. It raises Hint, by its name in
``data/hints.json``, or returns what the sentence about the right answer quotes. What is done is
kept in ``exercises.json`` of the run directory.
``python -m huanhuan.exercises`` writes the notebooks without the solutions.
"""

import contextlib
import gc
import math
import re
import reprlib
import tempfile
import time
import traceback
import weakref
from pathlib import Path

from huanhuan import DATA, NOTEBOOKS, CourseError, course, read_json
from huanhuan.course import GPU_MEMORY_4BIT_GIB, GPU_MEMORY_GIB, PROFILES, ROWS_PER_STEP
from huanhuan.persona import NAME, WHO
from huanhuan.prompt import end_id, prompt_ids, text_ids

BOOKS = ("01_setup", "02_preprocess", "03_train_lora", "04_infer", "05_cleanup")
TEXTS = read_json(DATA / "hints.json")


class Hint(Exception):
    """What is wrong with an answer: names in hints.json, and what their texts quote."""

    def __init__(self, *names: str, **quoted):
        self.names, self.quoted = names, quoted


def judge(number: str, answer, **context) -> tuple[str, str]:
    """What there is to say about an answer: ``right``, ``begin`` or the hint's name, and the text."""
    common, own = TEXTS["*"], TEXTS.get(str(number), {})
    try:
        if not own:
            raise Hint("unknown", all="、".join(JUDGES))
        if _untouched(answer):
            raise Hint("begin")
        said = Hint("right", **(JUDGES[str(number)](answer, **context) or {}))
    except Hint as hint:
        said = hint
    except (Exception, SystemExit) as error:
        said = Hint("failed", error=_words(error))
    title, step = own.get("title", ""), ROWS_PER_STEP
    quoted = context | {"number": number, "title": title, "step": step} | said.quoted
    text = "也可能是：".join((common | own)[name].format(**quoted) for name in said.names)
    return said.names[0], said.quoted.get("first", "") + text


def check(number: str, answer, *, solution: bool = False, **context) -> None:
    """Judge `answer` to exercise `number`: prints ✅ and why, or a hint; never raises.

    `context` is what the exercise is judged by. A right answer is recorded, unless it is the
    notebook's own `solution`.
    """
    verdict, text = judge(number, answer, **context)
    if verdict == "begin":
        print(text)
    elif verdict != "right":
        print(f"✗ {text}")
    elif solution:
        print(TEXTS["*"]["solution"].format(number=number))
    else:
        print(f"✅ {text}")
        try:
            run_dir = course.present_run_dir()
            with course.writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                file = run_dir / "exercises.json"
                recorded = _recorded(run_dir)
                if not recorded:  # one that cannot be read is kept
                    course.set_aside(file)
                now = {str(number): time.strftime("%Y-%m-%d %H:%M:%S")}
                course.write_json(file, recorded | now)
        except (CourseError, OSError) as error:
            print(f"（答对了，只是没有记下来：{error}）")


def progress(notebook: str) -> None:
    """Print one line: how many of the notebook's exercises are done, and which are not."""
    recorded, ours = _recorded(course.present_run_dir()), _of(notebook)
    left = [number for number in ours if number not in recorded]
    rest = f"，还有 {'、'.join(left)}" if left else "，全做完了"
    print(f"练习：{len(ours) - len(left)} / {len(ours)} 题{rest}")


def done(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Of every notebook: how many exercises are done in `run_dir`, of how many."""
    recorded = _recorded(run_dir)
    return {b: (sum(number in recorded for number in _of(b)), len(_of(b))) for b in BOOKS}


def student(folder: Path = NOTEBOOKS / "output" / "student") -> None:
    """Write the five notebooks without the cells tagged ``solution`` into `folder`."""
    import nbformat

    with course.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for book in BOOKS:
            notebook = nbformat.read(NOTEBOOKS / f"{book}.ipynb", as_version=4)
            tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
            cells = zip(notebook.cells, tags, strict=True)
            notebook.cells = [cell for cell, its in cells if "solution" not in its]
            nbformat.write(notebook, folder / f"{book}.ipynb")
    print(f"没有参考答案的五本写在 {folder}：发给学生时，换掉 notebooks 里同名的五本。")


def _of(notebook: str) -> list[str]:
    return [number for number in JUDGES if number.startswith(f"{int(notebook[:2])}.")]


def _recorded(run_dir: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        return read_json(run_dir / "exercises.json")
    return {}


def insist(condition, name: str, /, **quoted) -> None:
    """Raise the hint of that name unless the condition holds."""
    if not condition:
        raise Hint(name, **quoted)


def _untouched(answer) -> bool:
    if isinstance(answer, dict | list | tuple | set):
        return any(map(_untouched, answer.values() if isinstance(answer, dict) else answer))
    return answer is ... or (isinstance(answer, str) and answer == BROKEN)


def _words(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def call(function, *arguments):
    """What the learner's function returns; its failure becomes a hint with the error's own words."""
    insist(callable(function), "not_a_function", given=reprlib.repr(function))
    try:
        result = function(*arguments)
    except (Exception, SystemExit) as error:
        # an ellipsis that was used: something is still to be filled in
        unfinished = "ellipsis" in _words(error).lower()
        raise Hint("begin" if unfinished else "raised", error=_words(error)) from None
    insist(not _untouched(result), "begin")
    return result


def parts(answer, *names: str) -> list:
    """The values of a dict that has just these keys."""
    fit = isinstance(answer, dict) and answer.keys() == {*names}
    insist(fit, "not_these_parts", parts="、".join(names))
    return [answer[name] for name in names]


def number(answer, right: float, within=0.0, part="答案", other="otherwise", **wrong) -> None:
    """Insist that `answer` is `right`, to a share of `within`.

    `wrong`: what a mistake comes to (one value or several), by its hint; `other`: the hint for the rest.
    """
    fine = not isinstance(answer, str | bool | None) and hasattr(answer, "__float__")
    insist(fine, "not_a_number", part=part, given=reprlib.repr(answer))
    value = float(answer)

    def near(others) -> bool:
        others = others if isinstance(others, list) else [others]
        return any(math.isclose(value, o, rel_tol=within, abs_tol=within / 1e3) for o in others)

    if not near(right):
        names = [name for name, others in wrong.items() if near(others)]
        raise Hint(*names or [other], value=f"{value:g}", first=f"{part} {value:.8g} 不对。")


def listed(made, part: str) -> list:
    """A list, tuple or tensor as a list."""
    made = made.tolist() if hasattr(made, "tolist") else made
    insist(isinstance(made, list | tuple), "not_a_list", part=part, given=reprlib.repr(made))
    return list(made)


# Of a machine: its card's compute capability and GiB, None without a card.
MACHINES = {
    "T4": (7.5, 14.7), "RTX 3060": (8.6, 11.6), "RTX 4060 笔记本": (8.9, 7.6), "没有显卡": None
}  # fmt: skip


def exercise_1_1(answer):
    for machine, chosen in zip(MACHINES, parts(answer, *MACHINES), strict=True):
        known = isinstance(chosen, str) and chosen in PROFILES
        given, names = reprlib.repr(chosen), "、".join(PROFILES)
        insist(known, "no_such", machine=machine, given=given, all=names)
        profile, (capability, memory) = PROFILES[chosen], MACHINES[machine] or (0, 0)
        fits, bf16 = memory >= GPU_MEMORY_GIB, profile.dtype == "bfloat16"
        wrong = {
            "for_mac": profile.device == "mps",
            "needs_card": not memory and profile.device == "cuda",
            "has_card": memory and profile.device == "cpu",
            "fits": fits and profile.quantized,
            "too_small": memory and not fits and not profile.quantized,
            "no_bf16": memory and capability < 8 and bf16,
            "has_bf16": capability >= 8 and not bf16,
        }
        sizes = {"memory": memory, "whole": GPU_MEMORY_GIB, "quarter": GPU_MEMORY_4BIT_GIB}
        for name, so in wrong.items():
            insist(not so, name, machine=machine, chosen=chosen, capability=capability, **sizes)


def exercise_1_2(answer, parameters: int):
    gib = parameters / 2**30
    wrong = {"four_bytes": 4 * gib, "gb": parameters * 2 / 1e9, "one_byte": gib, "bits": 16 * gib}
    number(answer, 2 * gib, 0.005, **wrong)


BROKEN = """[
 {"instruction": "你是谁？", "input": "", "output": "我是她。"},
 {"instruction": "门牌上写着几号？", "input": "", "output": 007},
 {"instruction": "今天初几？", "input": ""，"output": "初七。"},
 {"instruction": "吃过饭了吗？", "input": "", "output": "吃过了。“},
 {"instruction": "你最怕什么？", "input": "", "output": ""}
]"""
WHOLE = [*re.findall(r'n": "(.*?)", .*output": "?(.*?)["“}]', BROKEN)]  # (question, answer)


def exercise_1_3(answer, load_rows):
    insist(isinstance(answer, str), "not_text")
    insist(not re.search(r':\s*(0*7|"7")\s*\}', answer), "seven")
    insist(not re.search(r'"output":\s*"\s*"', answer), "empty")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mended.json"
        file.write_text(answer, encoding="utf-8")
        try:
            rows = load_rows(file)
        except CourseError as error:
            raise Hint("unread", why=str(error).partition("。")[2].strip()) from None
    insist(len(rows) == len(WHOLE), "count", before=len(WHOLE), now=len(rows))
    for row, (made, was) in enumerate(zip(rows.itertuples(), WHOLE, strict=True), 1):
        same = made.instruction == was[0] and was[1] in ("", made.output)
        insist(same, "changed", row=row, was=was[1] or was[0])


def exercise_1_4(answer, df):
    share, kinds = parts(answer, "提到名字的比例", "问题种数")
    named, asked = (df[c].str.contains(NAME, regex=False) for c in ("output", "instruction"))
    one = df["output"].str.contains(NAME[-1], regex=False).mean()
    wrong = {"asked": asked.mean(), "one_character": one, "count": named.sum()}
    number(share, named.mean(), 0.005, "提到名字的比例", **wrong, percent=100 * named.mean())
    right = df["instruction"].nunique()
    number(kinds, right, part="问题种数", rows=len(df), answers=df["output"].nunique())
    return {"kinds": right, "rows": len(df)}


TWELVE = (
    "你是谁？", "今天吃什么？", "你是谁?", "下雪了。", "睡不着怎么办？", "你是谁？",
    "今天吃什么？", "花开了吗？", "下雪了", "你会弹琴吗？", "陪我走走吧。", "你 是谁",
)  # fmt: skip


def exercise_2_1(answer, normalised):
    both = call(answer, [*TWELVE])
    insist(isinstance(both, list | tuple) and len(both) == 2, "not_two")
    train, held = (listed(side, "每一边") for side in both)
    for one in train + held:
        fine = type(one) is int and 0 <= one < len(TWELVE)
        insist(fine, "not_numbers", last=len(TWELVE) - 1, given=reprlib.repr(one))
    lost, twice = len(TWELVE) - len({*train, *held}), {*train} & {*held}
    insist(not lost, "lost", count=lost)
    insist(not twice, "twice", row=min(twice, default=""))
    insist(train and held, "one_side")
    for name, key in (("leak", str), ("punctuation", normalised)):
        leaked = {key(TWELVE[i]) for i in train} & {key(TWELVE[i]) for i in held}
        insist(not leaked, name, question=min(leaked, default=""))


def exercise_2_2(answer, tokenizer):
    end, reply = end_id(tokenizer), text_ids(tokenizer, f"我是{NAME}。")
    prompt, taught = prompt_ids(tokenizer, WHO), [*reply, end]
    labels = listed(call(answer, [*prompt], [*reply], end), "标签")
    hidden = [-100] * len(prompt)
    right = hidden + taught
    wrong = {
        "prompt_too": [prompt + taught],
        "zero": [[0] * len(prompt) + taught],
        "shifted": [right[1:], right[1:] + labels[-1:], labels[:1] + right[:-1]],
        "no_end": [hidden + reply, [*hidden, *reply, -100]],
        "too_short": [taught, reply],
        "nothing": [[-100] * len(right)],
    }
    names = [name for name, others in wrong.items() if labels in others]
    insist(labels == right, *names[:1] or ["otherwise"], right=len(right), given=len(labels))


def exercise_2_3(answer, row, text: str):
    every, taught = len(row["labels"]), sum(label != -100 for label in row["labels"])
    wrong = {"one_less": taught - 1, "all": every, "prompt": every - taught}
    number(answer, taught, **wrong, characters=len(text))


def exercise_2_4(answer, tokenizer, max_length: int):
    end, bos = end_id(tokenizer), tokenizer.bos_token_id
    mark, long = tokenizer.decode([end]), "臣妾有一事不明，" * max_length
    rows = {
        "短的": (WHO, f"我是{NAME}。", []),
        "带标记的": (f"{mark}是什么？", f"写作{mark}。", []),
        "长的": (long, "准了。", []),
        "有前文的": ("后来呢？", "睡了。", [[WHO, f"我是{NAME}。"]]),
    }
    prompts = [prompt_ids(tokenizer, question) for question in ("天", "一")]
    same = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)  # before it
    for row, (asked, said, turns) in rows.items():
        example = {"instruction": asked, "input": "", "output": said, "history": turns}
        made, reply = call(answer, example), [*text_ids(tokenizer, said), end]
        fields = ("input_ids", "labels", "attention_mask")
        insist(hasattr(made, "keys") and {*fields} <= {*made.keys()}, "no_fields")
        ids, labels, mask = (listed(made[field], field) for field in fields)
        taught = [label for label in labels if label != -100]
        fine = {
            "lengths": len(ids) == len(mask) == len(labels),
            "end_lost": taught[-1:] == [end],
            "bos": bos not in taught[:-1],
            "ends": taught.count(end) == 1,
            "too_long": len(ids) <= max_length,
            "head_lost": ids[:same] == prompts[0][:same],
            "taught": taught == reply == ids[-len(reply) :],
            "history": not turns or ids[: -len(reply)] != prompt_ids(tokenizer, asked),
            "prompt": asked == long or ids[: -len(reply)] == prompt_ids(tokenizer, asked, turns),
        }
        for name, holds in fine.items():
            insist(holds, name, row=row)


def exercise_2_5(answer, vocabulary: int):
    loss, logs = math.log(vocabulary), {"base_two": math.log2, "base_ten": math.log10}
    wrong = {name: log(vocabulary) for name, log in logs.items()}
    number(answer, loss, 0.003, chance=1 / vocabulary, size=vocabulary, sign=-loss, **wrong)


def exercise_3_1(answer, model, config):
    named = [(n.split(".")[-1], m) for n, m in model.named_modules() if hasattr(m, "in_features")]
    shapes = [(n, m.in_features, m.out_features) for n, m in named if n in config.target_modules]
    r, layers = config.r, model.config.get_text_config().num_hidden_layers
    inputs, outputs = (r * sum(shape[side] for shape in shapes) for side in (1, 2))
    right, whole = inputs + outputs, sum(i * o for _, i, o in shapes)
    q_and_v = r * sum(i + o for name, i, o in shapes if name in ("q_proj", "v_proj"))
    wrong = {"one_of_two": [inputs, outputs, right / 2], "product": r * whole, "frozen": whole}
    wrong |= {"q_and_v": q_and_v, "one_layer": right / layers, "no_rank": right / r}
    number(answer, right, **wrong)
    return {"double": 2 * r, "more": f"{2 * right:,}"}


def exercise_3_2(answer, profile):
    difference, alpha = parts(answer, "差多少", "alpha")
    number(difference, 0, part="差多少", other="random")
    now, r = profile.lora_alpha, profile.lora_r
    number(alpha, 2 * now, part="alpha", same=now, halved=now / 2, ratio=now / r)


def exercise_3_3(answer, rows: int, epochs: int):
    a_round = math.ceil(rows / ROWS_PER_STEP)
    wrong = {"floor": rows // ROWS_PER_STEP * epochs, "one_epoch": a_round, "rows": rows * epochs}
    across = rows * epochs / ROWS_PER_STEP
    micro = [math.ceil(rows / size) * epochs for size in (2, 4, 8)]
    wrong |= {"across": math.ceil(across), "fraction": across, "micro": micro}
    number(answer, a_round * epochs, **wrong)


def exercise_3_4(answer, gpus: int, micro_batch: int):
    right = ROWS_PER_STEP / (gpus * micro_batch)
    number(answer, right, one_card=right * gpus, one_row=right * micro_batch)


def exercise_3_5(answer, log_history):
    best, overfit = parts(answer, "最好的一轮", "过拟合")
    # backwards: the first word on an epoch stands, whatever is evaluated after the training
    log = [entry for entry in reversed(log_history) if entry.get("epoch")]
    held = {round(e["epoch"]): e["eval_loss"] for e in log if "eval_loss" in e}
    seen = {math.ceil(e["epoch"]): e["loss"] for e in log if "loss" in e}
    insist(held and seen, "no_curve")
    right, last = min(held, key=held.get), max(held)
    wrong = {"last": last, "train": min(seen, key=seen.get), "value": held[right]}
    number(best, right, part="最好的一轮", **wrong)
    told = {"best": right, "low": f"{held[right]:.3f}", "end": f"{held[last]:.3f}"}
    insist(overfit is (right != last), "rises" if right != last else "falls", **told)
    return told


def exercise_4_1(answer, model, tokenizer):
    end, stops = end_id(tokenizer), model.generation_config.eos_token_id
    stops = {end, *(stops if isinstance(stops, list) else [stops])}
    given = [answer] if type(answer) is int else answer
    fine = isinstance(given, list | tuple | set) and given and all(type(i) is int for i in given)
    insist(fine, "not_ids", given=reprlib.repr(answer))
    for one in given:
        for name, token in (("bos", tokenizer.bos_token_id), ("pad", tokenizer.pad_token_id)):
            insist(one != token or one in stops, name, given=one)
        insist(one in stops, "stranger", given=one)
    insist(end in given, "other_end", end=tokenizer.decode([end]))


def exercise_4_2(answer, probabilities, top_p: float, temperature: float):
    kept, first = parts(answer, "留下几个", "第一个的概率")
    ordered = sorted(probabilities, reverse=True)
    enough = (n for n in range(1, len(ordered)) if sum(ordered[:n]) > top_p - 1e-9)
    right = next(enough, len(ordered))
    number(kept, right, part="留下几个", too_few=right - 1, too_many=len(ordered))

    def share(change) -> float:
        return change(probabilities[0]) / sum(map(change, probabilities))

    now, t = probabilities[0], temperature
    wrong = {"unchanged": now, "divided": now / t, "flatter": share(lambda p: p**t)}
    wrong |= {"not_log": share(lambda p: math.exp(p / t))}
    number(first, share(lambda p: p ** (1 / t)), 0.005, "第一个的概率", **wrong)


# Sentences, whether they say that the speaker is the persona, and the hint for who thinks otherwise.
SENTENCES = (
    ("我是{}。", True, "plain"), ("臣妾{}，给皇上请安。", True, "humble"), ("大家都叫我{}。", True, "called"),
    ("我不是{}。", False, "denied"), ("你是{}吧？", False, "asked"), ("{}是谁？我不认识她。", False, "of_another"),
    ("我是 AI 助手，正在扮演{}。", False, "machine"), ("今天天气真好，我很高兴。", False, "no_name"),
)  # fmt: skip


def exercise_4_3(answer):
    for sentence, right, name in SENTENCES:
        sentence = sentence.format(NAME)
        insist(bool(call(answer, sentence)) == right, name, sentence=sentence)


def exercise_4_4(answer, one: tuple[int, int], other: tuple[int, int], wilson):
    names = ("甲的下限", "乙的上限")
    *limits, proven = parts(answer, *names, "分得出高下")
    for side, (given, (k, n)) in enumerate(zip(limits, (one, other), strict=True)):
        p, right = k / n, wilson(k, n)[side]
        wald = p + (2 * side - 1) * 1.96 * math.sqrt(p * (1 - p) / n)
        wrong = {"share": p, "other_side": wilson(k, n)[1 - side], "percent": 100 * right}
        number(given, right, 0.005, names[side], wald=wald, **wrong)
    low, high = wilson(*one)[0], wilson(*other)[1]
    name = "overlap" if low <= high else "apart"
    insist(proven is (low > high), name, low=f"{low:.0%}", high=f"{high:.0%}")


def exercise_4_5(answer, batches):
    loss, perplexity = parts(answer, "损失", "困惑度")
    tokens, total = sum(n for _, n in batches), sum(x * n for x, n in batches)
    right, plain = total / tokens, sum(x for x, _ in batches) / len(batches)
    number(loss, right, 0.003, "损失", by_batch=plain, sum=total)
    wrong = {"base_two": 2**right, "of_by_batch": math.exp(plain)}
    average = sum(math.exp(x) for x, _ in batches) / len(batches)
    number(perplexity, math.exp(right), 0.005, "困惑度", **wrong, averaged=average)


class _Thing:
    """Stands for a model; and, pointing at itself, for what only the collector takes away."""


def _held() -> tuple[dict, weakref.ref, weakref.ref]:
    """Names that hold a model, the model, and garbage that tells whether the collector ran."""
    model, canary = _Thing(), _Thing()
    canary.itself, holder = canary, {"model": model}
    holder["holder"] = holder
    names = {"model": model, "also_model": model, "holder": holder, "Out": {7: model}}
    return names, weakref.ref(model), weakref.ref(canary)


def exercise_5_1(answer):
    gc.disable()  # or it might come by itself
    try:
        names, model, canary = _held()
        call(answer, names)
        collected = canary() is None
        left = [
            n for n, held in names.items() if model() in (held, *getattr(held, "values", list)())
        ]
        gone = model() is None
    finally:
        gc.enable()
    hint = "only_collected" if collected else "deleted_nothing"
    insist(gone or not left, hint if len(left) == 4 else "left", left="、".join(left))
    insist(gone, "too_early" if collected else "cycle")


def exercise_5_2(answer):
    # 甲 empty_cache()  乙 del model  丙 gc.collect()  丁 memory()  戊 del trainer
    whole = isinstance(answer, str) and sorted(answer) == sorted("甲乙丙丁戊")
    insist(whole, "not_all", letters="甲、乙、丙、丁、戊")
    cache, model, collect, measure, trainer = map(answer.index, "甲乙丙丁戊")
    deleted = max(model, trainer)
    insist(cache > deleted, "cache_first")
    insist(collect > deleted, "collect_first")
    insist(cache > collect, "cache_before_collect")
    insist(measure == 4, "measured_early")


RENEWED = ("checkpoints", "local", "merged", "gguf")  # a notebook makes them again


def exercise_5_3(answer, listing):
    sizes = dict(zip(listing["名称"], listing["MiB"], strict=True))
    fine = isinstance(answer, list | tuple | set) and all(isinstance(n, str) for n in answer)
    insist(fine, "not_names")
    for name in answer:
        insist(name in sizes, "outside", name=reprlib.repr(name))
        insist(not name.startswith(("llama3_lora", "chats")), "yours", name=name)
        insist(name in RENEWED or name.startswith("unfinished-"), "needed", name=name)
    left = [name for name in RENEWED if name in sizes and name not in answer]
    spare, freed = (f"{sum(sizes[n] for n in names):.1f}" for names in (left, {*answer}))
    insist(not left, "more", spare=spare, left="、".join(left))
    return {"freed": freed}


# The judge of every exercise: exercise_1_1 judges 1.1.
JUDGES = {name[9:].replace("_", "."): f for name, f in globals().items() if name[:9] == "exercise_"}

if __name__ == "__main__":
    student()
