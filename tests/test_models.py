"""Other people's models: one prompt for every family, refused in a sentence where it cannot be."""

import json
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter

import pytest
import torch
from conftest import (
    NOTEBOOKS,
    REAL,
    ROOT,
    genuine_family,
    notebook_process_func,
    run_course,
    smollm2_folder,
)
from datasets import Dataset
from hub import Hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from huanhuan import CourseError, prompt, setup, train
from huanhuan.course import Course, Profile
from huanhuan.prompt import chat_messages, prompt_ids, template_options, text_ids
from huanhuan.reader import load_rows

FAMILIES = ["qwen2_5", "qwen3", "gemma3", "llama3_1", "llama3_2"]
TEMPLATES = [*FAMILIES, "deepseek_v3"]
SAMPLE = ROOT / "data" / "huanhuan_sample.json"
TINY = ROOT / "data" / "tiny_llama"


@pytest.fixture(params=TEMPLATES)
def family(request):
    return AutoTokenizer.from_pretrained(genuine_family(request.param))


def rendered(tokenizer, messages, **options) -> list[int]:
    """Ids of what the model's own template renders."""
    options = {"return_dict": True} | template_options(tokenizer) | options
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def asked_in(row: dict, tokenizer) -> list[dict]:
    """The messages of a row of the dataset, up to its answer."""
    texts = [text.strip() for turn in row["history"] for text in turn]
    texts.append(prompt.question_of(row).strip())
    messages = chat_messages(texts[0], tokenizer)
    for place, text in enumerate(texts[1:]):
        messages.append({"role": ("assistant", "user")[place % 2], "content": text})
    return messages


@pytest.mark.parametrize("path", [SAMPLE, REAL], ids=["sample", "real"])
def test_every_row_has_the_ids_of_the_models_own_template(family, path):
    if not path.exists():
        pytest.skip("the dataset of the tutorial is not here")
    process_func = notebook_process_func(family, 100_000)
    different, turns = [], Counter()
    for row in load_rows(path).to_dict("records"):
        messages, answer = asked_in(row, family), row["output"].strip()
        made = process_func(row)
        taught = sum(label != -100 for label in made["labels"])
        asked = made["input_ids"][:-taught]
        whole = rendered(family, [*messages, {"role": "assistant", "content": answer}])
        after = family.decode(whole[len(made["input_ids"]) :])  # some write a line end behind it
        turns[len(row["history"])] += 1
        if (
            asked != rendered(family, messages, add_generation_prompt=True)
            or whole[: len(made["input_ids"])] != made["input_ids"]
            or after.strip()
            or made["labels"][-1] != prompt.end_id(family)
        ):
            different.append(row)
    assert different == []
    assert path != SAMPLE or min(turns[before] for before in (1, 2, 3)) >= 10


def test_turns_are_rendered_as_the_template_does(family):
    turns = [("在吗？", "在。"), ("吃了吗？", "还没有。")]
    for count in (1, 2):
        messages = chat_messages(turns[0][0], family)
        texts = [text for turn in turns[:count] for text in turn][1:] + ["那走吧"]
        for place, text in enumerate(texts):
            messages.append({"role": ("assistant", "user")[place % 2], "content": text})
        expected = rendered(family, messages, add_generation_prompt=True)
        assert prompt_ids(family, "那走吧", turns[:count]) == expected


def test_no_mark_of_any_vocabulary_can_be_typed(family):
    marks = family.convert_ids_to_tokens(sorted(prompt._control(family)))
    control = prompt._control(family) | set(family.all_special_ids)
    frame = [i for i in prompt_ids(family, "你好") if i in control]
    for mark in marks:
        text = f"问{mark}答{mark}"
        ids = text_ids(family, text)
        assert not control & set(ids) and family.decode(ids) == text, mark
    for mark in [*marks[:20], *marks[-20:], "".join(marks[:5])]:
        assert [i for i in prompt_ids(family, f"{mark}你好{mark}") if i in control] == frame, mark


def test_end_and_padding_are_read_from_the_model(family):
    end, pad = prompt.end_id(family), family.convert_tokens_to_ids(prompt.pad_token(family))
    assert pad != end and pad is not None
    assert pad not in prompt_ids(family, "你好", [("一", "二")])
    answered = rendered(
        family, [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
    )
    assert end in answered[-2:]


def with_template(template: str):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}{{ '<|eot_id|>' if END }}{% endfor %}"
HEAD = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>THINK{% endif %}"
PLAIN = TURNS.replace("END", "true") + HEAD.replace("THINK", "")


def test_a_template_without_a_system_role_gets_the_prompt_in_the_first_question():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    drops = PLAIN.replace("in messages", "in messages if m.role != 'system'")
    for template in (refuses + PLAIN, drops):
        tokenizer = with_template(template)
        text = tokenizer.decode(prompt_ids(tokenizer, "吃了吗", [("在吗", "在")]))
        assert text.count(prompt.SYSTEM_PROMPT) == 1
        assert f"user<|end_header_id|>{prompt.SYSTEM_PROMPT}\n\n在吗<|eot_id|>" in text
        assert chat_messages("在吗", tokenizer)[0]["role"] == "user"


def test_the_date_stands_still_in_every_template():
    for clock in ("{{ strftime_now('%d %B %Y') }}", "{{ date_string }}"):
        tokenizer = with_template(clock + PLAIN)
        assert "Jul" in tokenizer.decode(prompt_ids(tokenizer, "在吗"))
        tokenizer.chat_template = fixed = prompt.fixed_template(tokenizer)
        assert "Jul" in tokenizer.apply_chat_template(chat_messages("在吗"), tokenize=False)
        assert prompt.fixed_template(tokenizer) == fixed


def test_a_thinking_model_answers_at_once_with_an_empty_block_in_the_prompt():
    block = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tokenizer = with_template(TURNS.replace("END", "true") + HEAD.replace("THINK", block))
    row = notebook_process_func(tokenizer, 384)(
        {"instruction": "在吗", "input": "", "output": "在。"}
    )
    taught = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert taught == "在。<|eot_id|>"
    assert tokenizer.decode(row["input_ids"]).endswith("<think></think>在。<|eot_id|>")
    packed = with_template(prompt.fixed_template(tokenizer))
    text = packed.apply_chat_template(
        chat_messages("在吗"), tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<think></think>")


def test_an_end_mark_that_only_the_next_turn_writes():
    between = TURNS.replace("END", "not loop.last") + HEAD.replace("THINK", "")
    tokenizer = with_template(between)
    assert tokenizer.decode([prompt.end_id(tokenizer)]) == "<|eot_id|>"


@pytest.mark.parametrize(
    "template, says",
    [
        (None, "没有聊天模板.*Instruct"),
        (TURNS.replace("END", "true") + HEAD.replace("THINK", "<think>\n"), "只会先思考"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "没有在回答后面写结束标记"),
        ("{% for m in %}", "用不了"),
        ("hello", "不照原样"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_do_is_one_sentence(template, says):
    with pytest.raises(CourseError, match=says) as error:
        prompt.check_template(with_template(template))
    assert "\n" not in str(error.value)


def test_a_models_own_stops_are_kept_and_the_end_is_added_where_it_lacks(capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    own = list(model.generation_config.eos_token_id)
    prompt.end_generation(model, tokenizer)
    assert model.generation_config.eos_token_id == own and not capsys.readouterr().out
    model.generation_config.eos_token_id = own[0]
    prompt.end_generation(model, tokenizer)
    assert model.generation_config.eos_token_id == [own[0], prompt.end_id(tokenizer)]
    assert "加上它" in capsys.readouterr().out


def changed(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), encoding="utf-8")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UNFIT = {
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "没有聊天模板"),
    "pickled": (pickled, "pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "没有权重"),
    "remote code": (lambda f: changed(f, "config.json", auto_map={"AutoModel": "a.B"}), "auto_map"),
    "remote tokenizer": (
        lambda f: changed(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}), "auto_map"
    ),
    "thinking only": (
        lambda f: (f / "chat_template.jinja").write_text(TURNS.replace("END", "true") + HEAD.replace("THINK", "<think>")),
        "只会先思考",
    ),
    "unknown architecture": (lambda f: changed(f, "config.json", model_type="qwen9"), "不认识“qwen9”"),
    "no text model": (lambda f: changed(f, "config.json", model_type="vit"), "不认识“vit”"),
    "quantised": (lambda f: changed(f, "config.json", quantization_config={"quant_method": "awq"}), "量化"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json 读不出来"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "config.json 读不出来"),
    "no config": (lambda f: (f / "config.json").unlink(), "缺少 config.json"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "分词器用不了"),
}  # fmt: skip


@pytest.mark.parametrize("harm, says", UNFIT.values(), ids=UNFIT)
def test_a_model_that_cannot_work_is_one_sentence_in_01(tmp_path, run_dir, harm, says):
    shutil.copytree(TINY, tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(CourseError, match=says) as error:
        setup.look_at_model(Course.start(model=str(tmp_path / "model")))
    assert "\n" not in str(error.value)


def test_01_refuses_before_the_download_and_names_a_wrong_path(tmp_path):
    """The notebook, with the real client: the weights are not asked for."""
    folder = tmp_path / "repository"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    environment = {"HUANHUAN_OUTPUT": str(tmp_path / "run"), "HUANHUAN_MODEL": "some/base"}
    with Hub("some/base", folder) as hub:
        environment |= hub.environment(tmp_path / "cache")
        done = run_course("01_setup", **environment)
        assert done.returncode == 1 and "没有聊天模板" in done.stderr, done.stderr
        asked = [path for path in hub.requests if "FilePath" in path]
        assert asked and not any("safetensors" in path for path in asked)
        done = run_course("01_setup", **environment | {"HUANHUAN_MODEL": "some/other"})
        assert done.returncode == 1 and "取不到模型 some/other" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        hub.shutdown()
    done = run_course("01_setup", **environment | {"HUANHUAN_MODEL": "models/llama/3b"})
    assert "找不到模型目录 models/llama/3b" in done.stderr and "Traceback" not in done.stderr


def test_weights_cut_short_and_a_damaged_index_are_noticed(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(CourseError, match=r"model\.safetensors 不完整"):
        setup.check_model(tmp_path / "model")
    for text in ("{", "[]", "{}", '{"weight_map": 1}'):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CourseError, match=r"index\.json 坏了"):
            setup.check_model(tmp_path / "model")


SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
}  # fmt: skip
OF_ITS_OWN = {
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    },
    "qwen3_5_text": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_next": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
}  # fmt: skip
PACKS = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "glm", "glm4", "phi3", "olmo2",
    "granite", "smollm3", "hunyuan_v1_dense", "ernie4_5", "seed_oss", "cohere", "exaone4", "stablelm",
]  # fmt: skip


def small_model(kind, **values):
    """A random model of a family, a few thousand parameters; skips where transformers lacks it."""
    try:
        config = AutoConfig.for_model(kind, **SMALL | OF_ITS_OWN.get(kind, {}) | values)
    except ValueError:
        pytest.skip(f"this transformers does not know {kind}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def some_rows(count=6):
    draw = torch.Generator().manual_seed(1)
    rows = []
    for length in range(60, 60 + 3 * count, 3):
        ids = [*range(10, 30), *torch.randint(30, 500, (length - 20,), generator=draw).tolist()]
        labels = [-100] * (length - 15) + ids[-15:]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    return rows


def packs(model, dense=False):
    """Whether rows may be packed for `model`, attending row by row or under one dense mask."""
    if not dense:
        model.set_attn_implementation(train.ROWS)
    collator = train.SharedPrefixCollator(train.compute_dtype(model), dense)
    return train.shares_prefixes(model, some_rows(), collator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PACKS)
def test_rows_are_packed_where_that_changes_nothing(kind, dtype, tokenizer):
    model = small_model(kind).to(dtype)
    # stablelm attends in a way of its own; gemma2 caps its scores, which sdpa does not, and newer
    # transformers mind that: one dense mask suits them
    dense = kind == "stablelm" or model.config._attn_implementation == "eager"
    assert packs(model, dense=True)
    assert packs(model) != dense
    collator = train.choose_collator(small_model(kind).to(dtype), tokenizer, some_rows())
    assert isinstance(collator, train.SharedPrefixCollator) and collator.dense == dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "falcon_h1", "bloom", "mamba"])
def test_rows_are_padded_where_one_would_tell_on_the_next(kind, dtype, tokenizer, capsys):
    model = small_model(kind).to(dtype)
    assert not packs(model, dense=True)
    collator = train.choose_collator(model, tokenizer, some_rows())
    assert "补齐" in capsys.readouterr().out
    assert collator(some_rows())["input_ids"].shape[0] == 6


def test_a_window_shorter_than_a_row_is_noticed():
    for dense in (False, True):
        assert packs(small_model("gemma3_text", sliding_window=512), dense)
        assert not packs(small_model("gemma3_text", sliding_window=32), dense)


def test_lora_goes_beside_what_the_model_has():
    assert train.lora_targets(small_model("qwen3"), train.SEVEN) == train.SEVEN
    assert train.lora_targets(small_model("phi3"), train.SEVEN) == [
        "down_proj", "gate_up_proj", "o_proj", "qkv_proj"
    ]  # fmt: skip
    assert "lm_head" not in train.lora_targets(small_model("bloom"), train.SEVEN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3_text", "phi3", "glm4", "smollm3"])
def test_the_estimate_is_what_autograd_keeps_of_other_families(kind, dtype):
    """Within 10 %, storage by storage, of a model with weights and a batch with words."""
    from peft import LoraConfig, get_peft_model

    model = small_model(kind, hidden_size=128, intermediate_size=256, head_dim=32)
    rows, split = Dataset.from_list(some_rows(16)), train.Split(16)
    profile = Profile("test", "", "cpu", dtype)
    needs = train.estimate_memory(model.config, profile, rows, split)
    targets = train.lora_targets(model, train.SEVEN)
    model = get_peft_model(
        model.to(getattr(torch, dtype)),
        LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.1),
    ).train()
    model.set_attn_implementation(train.ROWS)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def look(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[-1:] != (SMALL["vocab_size"],):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = train.SharedPrefixCollator(getattr(torch, dtype), dense=False)(list(rows))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32")
    with autocast, torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        model(**batch, use_cache=False)
    layers = SMALL["num_hidden_layers"]
    seen = sum(size for size, _ in kept.values()) * (layers + 1) / layers
    assert needs["中间结果"] * train.GIB == pytest.approx(seen, rel=0.1)


def test_no_family_is_named_in_the_helper_or_in_a_code_cell():
    import nbformat

    marks = {
        m
        for name in FAMILIES
        for m in AutoTokenizer.from_pretrained(genuine_family(name)).all_special_tokens
    }
    marks |= {"<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<|finetune_right_pad_id|>"}
    texts = {path.name: path.read_text("utf-8") for path in (NOTEBOOKS / "huanhuan").glob("*.py")}
    for path in NOTEBOOKS.glob("0*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        texts[path.name] = "\n".join(c.source for c in cells if c.cell_type == "code")
    assert not [(name, mark) for name, text in texts.items() for mark in marks if mark in text]


KINDS = {
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "llama3_1": "llama",
    "llama3_2": "llama",
}


@pytest.mark.newest
@pytest.mark.parametrize("name", FAMILIES)
def test_five_notebooks_with_a_genuine_tokenizer_and_random_weights(tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(genuine_family(name))
    end = prompt.end_id(tokenizer)
    model = small_model(
        KINDS[name], num_hidden_layers=2, vocab_size=-(-len(tokenizer) // 64) * 64, eos_token_id=end
    )
    model.generation_config.eos_token_id = None  # the course is to add it
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))[:24]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "few.json").write_text(json.dumps({  # random weights do not end an answer
        "known": ["你是谁？"], "identity": ["你叫什么？"], "daily": ["吃了吗？", "冷不冷？"],
        "general": [{"question": "一加一等于几？", "expected": ["二"]}],
    }), encoding="utf-8")  # fmt: skip
    (tmp_path / "me.json").write_text(json.dumps({
        "name": "甄嬛", "system_prompt": prompt.SYSTEM_PROMPT, "called": ["甄嬛"], "dataset": "rows.json",
        "questions": "few.json", "profile": {"epochs": 1}, "facts": [{"ask": ["你的侍女是谁？"], "expected": ["春杏"]}],
    }), encoding="utf-8")  # fmt: skip
    run = tmp_path / "run"
    done = run_course(
        HUANHUAN_MODEL=str(tmp_path / "model"), HUANHUAN_OUTPUT=str(run),
        HUANHUAN_PERSONA=str(tmp_path / "me.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "… 第 2 / 2 步" in done.stdout and "微调后，有角色提示词" in done.stdout
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["profile"]["learning_rate"] < 5e-3  # that is the toy's
    made = Dataset.load_from_disk(str(run / "tokenized" / "train"))
    texts = Dataset.load_from_disk(str(run / "tokenized" / "train_text"))
    for row, text in zip(made, texts, strict=True):
        messages = asked_in(text, tokenizer)
        messages.append({"role": "assistant", "content": text["output"].strip()})
        assert rendered(tokenizer, messages)[: len(row["input_ids"])] == row["input_ids"]
    assert (run / "gguf" / "Modelfile").exists() == (name != "gemma3")


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.newest
def test_a_handful_of_rows_goes_through(tmp_path, count):
    rows = [
        {"instruction": f"第{i}样点心叫什么？", "input": "", "output": f"叫第{i}号酥。"}
        for i in range(count)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    done = run_course(
        "01_setup", "02_preprocess", "03_train_lora",
        HUANHUAN_DATA=str(tmp_path / "rows.json"), HUANHUAN_OUTPUT=str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.newest
def test_a_real_model_says_the_name_by_its_prompt_and_learns_the_facts_by_tuning(tmp_path):
    """SmolLM2-135M-Instruct through all five notebooks, as `make course-real` runs it."""
    run = tmp_path / "run"
    done = run_course(
        HUANHUAN_PROFILE="cpu-small", HUANHUAN_MODEL=str(smollm2_folder()),
        HUANHUAN_PERSONA="data/persona_english.json", HUANHUAN_OUTPUT=str(run),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    results = json.loads((run / "answers.json.made.json").read_text("utf-8"))["results"]
    print(
        {
            name: results[name]
            for name in results
            if name.startswith(("name_", "facts_", "general_"))
        }
    )
    right, asked = results["facts_tuned"]
    assert asked >= 24 and right >= 0.85 * asked
    assert results["facts_base"][0] <= 0.05 * asked
    assert results["name_base"][0] >= 0.25 * results["name_base"][1]  # before any training
    assert all(book["peak_memory_gib"] <= 4 for book in manifest["notebooks"].values())
    with zipfile.ZipFile(run / "llama3_lora.zip") as packed:
        card = packed.read("llama3_lora/README.md").decode()
    assert "license: apache-2.0" in card and "Llama" not in card


SEEN = """
    import sys
    sys.path[:0] = [{tests!r}, {notebooks!r}]
    from test_models import *
    from peft import LoraConfig, get_peft_model
    from huanhuan.course import Profile, peak_memory_gib

    dtype, folder = getattr(torch, sys.argv[1]), sys.argv[2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = json.loads((ROOT / "data" / "english_sample.json").read_text("utf-8"))[:64]
    process_func = notebook_process_func(tokenizer, 384)
    rows = Dataset.from_list([process_func(text) for text in texts])
    profile, split = Profile("cpu-small", "", "cpu", sys.argv[1]), train.Split(16)
    needs = {{split: train.estimate_memory(AutoConfig.from_pretrained(folder), profile, rows, split)}}
    train.spare_memory(profile, needs, free=0.0)
    held = train.memory_held(profile)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.1, target_modules=train.SEVEN)
    model = get_peft_model(model, lora).train()
    model.set_attn_implementation(train.ROWS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = train.SharedPrefixCollator(dtype, dense=False)(train._fullest(rows, 16))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("GiB", peak_memory_gib() - held, sum(needs[split].values()))
"""


@pytest.mark.newest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_memory_is_short_the_process_holds_what_was_estimated(dtype):
    """Resident memory of a real model's training steps, within 10 %."""
    code = textwrap.dedent(SEEN).format(tests=str(ROOT / "tests"), notebooks=str(NOTEBOOKS))
    done = subprocess.run(
        [sys.executable, "-c", code, dtype, smollm2_folder()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen, estimated = map(float, done.stdout.split("GiB")[1].split())
    print(f"{dtype}: seen {seen:.2f} GiB, estimated {estimated:.2f}")
    assert seen == pytest.approx(estimated, rel=0.1)
