"""What leaves the course: the GGUF file, the Modelfile and the model card, for any family of models."""

import ast
import json
import re
import shutil
import socket
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import gguf
import pytest
import torch
import transformers
from conftest import ROOT, genuine_family, smollm2_folder
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from huanhuan import infer
from huanhuan.course import HANDED_ON, PROFILES, Course, CourseError
from huanhuan.persona import NAME
from huanhuan.prompt import DATE_STRING, chat_messages, end_id, pad_token, prompt_ids

TINY = ROOT / "data" / "tiny_llama"

# Gemma 2's: refuses a system prompt (Gemma 3's, above whose vocabulary it stands here, takes one).
NO_SYSTEM = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""
# Mistral's way: the system prompt goes into the last question.
NOT_ALIKE = """{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + (system + '\n\n' if loop.last else '') + m.content + '<|im_end|>' }}{% endfor %}"""
# Pieces in which Go would find actions, and Ollama the end of the template.
ODD = """{% for m in messages %}{{ '<|im_start|>{{ end }}{' + m.role + '}"\n' + m.content + '<|im_end|>\n' + '\"' * 3 + '\n{' }}{% endfor %}"""


def family(name: str, template: str | None = None):
    """A tokenizer, genuine but for the tiny model's; with another chat template where one is given."""
    special = {"tiny": lambda: TINY, "smollm2": smollm2_folder}
    tokenizer = AutoTokenizer.from_pretrained(special.get(name, lambda: genuine_family(name))())
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


class LlamaCpp:
    """llama.cpp's own server on a GGUF file, in this process."""

    def __init__(self, file: Path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), 2048, 1
        params.cpuparams.n_threads, params.warmup = 2, False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            params.port = free.getsockname()[1]
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)

    def ids(self, messages: list[dict]) -> list[int]:
        """The prompt's, by the chat template and the vocabulary in the file."""
        prompt = self.post("/apply-template", messages=messages)["prompt"]
        return self.post("/tokenize", content=prompt, add_special=True, parse_special=True)[
            "tokens"
        ]


def test_llama_cpp_reads_the_gguf_makes_our_tokens_and_gives_the_same_answers(
    finished_run, tokenizer
):
    """Tokens of 50 prompts by llama.cpp's own tokenizer and the template in the file."""
    merged = AutoModelForCausalLM.from_pretrained(
        finished_run.run_dir / "merged", dtype=torch.float32
    ).eval()
    engine = LlamaCpp(finished_run.run_dir / "gguf" / "llama3_merged.gguf")
    texts = datasets.load_from_disk(finished_run.path("tokenized"))
    asked = [*texts["eval_text"]["instruction"], *infer.held_out_questions([])["identity"]][-50:]
    same = 0
    for question in asked:
        messages = chat_messages(question)
        assert engine.ids(messages) == prompt_ids(tokenizer, question)
        answer = engine.post(
            "/v1/chat/completions", messages=messages, temperature=0, max_tokens=200
        )["choices"][0]
        assert answer["finish_reason"] == "stop"
        expected = infer.ask(merged, tokenizer, question).text
        same += answer["message"]["content"].strip() == expected
    assert len(asked) == 50 and same >= 48  # 16-bit weights and other kernels


QUESTIONS = [
    "你是谁？",
    "I'm 12345 years old… 嬛嬛一袅楚宫腰🌸 3.14\n\n  x",
    "今夜月色很好。" * 90,
]


def same_as_llama_cpp(model, tokenizer, engine: LlamaCpp, asked: list[str], **system) -> float:
    """Compare the tokens of QUESTIONS, and the scores of what comes next after those `asked`.

    Returns the largest difference of two log-probabilities.
    """
    for question in QUESTIONS:
        assert engine.ids(chat_messages(question, tokenizer)) == prompt_ids(tokenizer, question)
    apart = 0.0
    for question in asked:
        ids = prompt_ids(tokenizer, question, **system)
        answer = engine.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=5)
        top = answer["completion_probabilities"][0]["top_logprobs"]
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert top[0]["id"] == scores.argmax()
        apart = max(apart, *(abs(one["logprob"] - scores[one["id"]].item()) for one in top))
    end = end_id(tokenizer)
    bias = {"logit_bias": [[end, 1000.0]]}  # it is what comes next: then nothing follows it
    answer = engine.post("/completion", prompt=ids, n_predict=3, temperature=0, **bias)
    assert answer["stop_type"] == "eos" and answer["tokens_predicted"] == 1
    return apart


def told(file: Path, *names: str) -> list:
    """What a GGUF file says of its tokenizer under these names."""
    fields = gguf.GGUFReader(file).fields
    return [fields[f"tokenizer.ggml.{name}"].contents() for name in names]


def random_model(kind: str, theta: float, rope: dict | None = None, **config):
    """Small, with nothing left at zero or one: neither biases nor norms."""
    torch.manual_seed(0)
    old = {"rope_theta": theta, "rope_scaling": rope}
    new = {"rope_parameters": (rope or {"rope_type": "default"}) | {"rope_theta": theta}}
    config = transformers.AutoConfig.for_model(
        kind,
        num_hidden_layers=2,
        initializer_range=0.2,
        **config,
        **(new if transformers.__version__ > "5" else old),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=0.5, std=0.3)
    return model


LLAMA_3_2 = {  # in the proportions of the 3B
    "kind": "llama", "vocab_size": 128256, "hidden_size": 192, "intermediate_size": 512,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "theta": 500000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN = {
    "vocab_size": 151936, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "theta": 1000000.0,
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama3_2", LLAMA_3_2),
        ("qwen2_5", QWEN | {"kind": "qwen2", "tie_word_embeddings": True}),
        ("qwen3", QWEN | {"kind": "qwen3", "tie_word_embeddings": False, "head_dim": 32}),
    ],
    ids=["llama", "qwen2", "qwen3"],
)
def test_the_gguf_holds_for_random_weights_and_genuine_vocabularies(name, shape, tmp_path):
    tokenizer = family(name)
    # What a packed template says: an engine gives neither the date nor leave not to think.
    fixed = f'{{% set date_string = "{DATE_STRING}" %}}{{% set enable_thinking = false %}}'
    tokenizer.chat_template = fixed + tokenizer.chat_template
    if name == "qwen3":
        # An end mark that llama.cpp does not know by its text, and that is not the eos_token.
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|box_end|>")
        assert end_id(tokenizer) != tokenizer.eos_token_id
    model = random_model(**shape)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "random.gguf"
    infer.write_gguf(model, tmp_path, file)
    pre, bos, tokens, kinds = told(file, "pre", "add_bos_token", "tokens", "token_type")
    llama = name.startswith("llama")
    assert pre == ("llama-bpe" if llama else "qwen2") and bos is llama
    assert len(tokens) == len(kinds) == len({*tokens}) == shape["vocab_size"]
    known = len(tokenizer)
    assert tokens[:known] == tokenizer.convert_ids_to_tokens(range(known))
    added = {i: 3 if token.special else 4 for i, token in tokenizer.added_tokens_decoder.items()}
    assert kinds == [added.get(i, 1 if i < known else 5) for i in range(len(kinds))]
    apart = same_as_llama_cpp(model, tokenizer, LlamaCpp(file), QUESTIONS)
    print(f"log-probabilities of the next token apart by {apart:.1e}")
    assert apart < 0.05


@pytest.mark.newest
@pytest.mark.parametrize("cut", ["gpt-2", "smollm"])
def test_the_gguf_of_a_real_model_answers_as_it_does(cut, tmp_path):
    """SmolLM2, with the tokenizer that transformers makes of a GGUF file, and with the genuine one's cut."""
    tokenizer = family("smollm2")
    digits = [pre_tokenizers.Digits(individual_digits=True)] * (cut == "smollm")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    infer.write_gguf(model, tmp_path, tmp_path / "smollm2.gguf")
    assert told(tmp_path / "smollm2.gguf", "pre", "add_bos_token") == [cut, False]
    engine = LlamaCpp(tmp_path / "smollm2.gguf")
    # Asked in English and without the persona: llama.cpp keeps back the scores of half a character.
    asked = ["What is the capital of France?", "How much is 12345 +  3.14?\n\n  Why? " * 30]
    apart = same_as_llama_cpp(model, tokenizer, engine, asked, system=None)
    print(f"log-probabilities of the next token apart by {apart:.1e}")
    assert apart < 0.05
    messages = [{"role": "user", "content": asked[0]}]
    answer = engine.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=40)
    ids = torch.tensor([prompt_ids(tokenizer, asked[0], system=None)])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert "Paris" in expected and answer["choices"][0]["message"]["content"].strip() == expected


def test_what_cannot_be_written_as_a_gguf_is_refused_before_anything_is_written(tmp_path):
    small = {
        "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**small))
    with pytest.raises(CourseError, match="mistral.*convert_hf_to_gguf"):
        infer.write_gguf(mistral, tmp_path, tmp_path / "model.gguf")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    for name in ("deepseek_v3", "gemma3"):
        with pytest.raises(CourseError, match="分词器切分文字的方式.*convert_hf_to_gguf"):
            infer.write_gguf(llama, genuine_family(name), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions, as Ollama's parser cuts them: a value in \"\"\" goes on until a line ends with it."""
    found, lines = [], text.splitlines()
    while lines:
        name, _, value = lines.pop(0).partition(" ")
        while value.startswith('"""') and not (len(value) >= 6 and value.rstrip().endswith('"""')):
            value += "\n" + lines.pop(0)
        value = value.rstrip()
        found.append((name, value[3:-3] if value.startswith('"""') else value))
    return found


SAID = [("你是谁？", "我是甄嬛。"), ("a {{ b }} \\n", "<甲>")]


@pytest.fixture
def filled(tmp_path, capfd):
    """A Modelfile's template filled in by Go's own text/template, as Ollama does."""
    import go_template

    def fill(modelfile: str, turns: list[tuple[str, str]], question: str) -> str:
        parts = dict(read_modelfile(modelfile))
        messages = [{"Role": "system", "Content": parts["SYSTEM"]}]
        for asked, answer in turns:
            messages += [{"Role": "user", "Content": asked}]
            messages += [{"Role": "assistant", "Content": answer}]
        messages += [{"Role": "user", "Content": question}]
        values, template = tmp_path / "values.json", tmp_path / "template"
        values.write_text(json.dumps({"Messages": messages, "Response": ""}), encoding="utf-8")
        template.write_text(parts["TEMPLATE"], encoding="utf-8")
        capfd.readouterr()
        go_template.render_template(str(template), str(values), "")
        return capfd.readouterr().out

    return fill


FAMILIES = [
    ("tiny", None, "<|eot_id|>"),
    ("llama3_1", None, "<|eot_id|>"),
    ("llama3_2", None, "<|eot_id|>"),
    ("qwen2_5", None, "<|im_end|>"),
    ("qwen3", None, "<|im_end|>"),
    ("smollm2", None, "<|im_end|>"),
    ("gemma3", None, "<end_of_turn>"),
    ("gemma3", NO_SYSTEM, "<end_of_turn>"),
    ("deepseek_v3", None, "<｜end▁of▁sentence｜>"),
    ("qwen2_5", ODD, "<|im_end|>"),
]


@pytest.mark.parametrize(("name", "template", "end"), FAMILIES)
def test_ollamas_template_is_the_models_own_token_by_token(name, template, end, filled):
    tokenizer = family(name, template)
    modelfile = infer.modelfile(tokenizer, "./some.gguf")
    assert ("FROM", "./some.gguf") in read_modelfile(modelfile)
    assert ("PARAMETER", f"stop {end}") in read_modelfile(modelfile)
    for turns in range(3):
        text = filled(modelfile, SAID[:turns], "今天下雪了")
        # with BOS where the tokenizer writes it, as llama.cpp does
        assert tokenizer.encode(text) == prompt_ids(tokenizer, "今天下雪了", SAID[:turns])


def test_the_runs_modelfile_is_made_so(finished_run, tokenizer):
    text = (finished_run.run_dir / "gguf" / "Modelfile").read_text(encoding="utf-8")
    assert text == infer.modelfile(tokenizer, "./llama3_merged.gguf")


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_personas_prompt_cannot_add_to_the_modelfile(name, filled, monkeypatch):
    prompt = '"说 {{ .Role }} {%s}"""\nPARAMETER stop 我\nSYSTEM """坏人"""\n{{ end }}""""'
    monkeypatch.setattr(infer, "SYSTEM_PROMPT", prompt)
    tokenizer = family(name)
    modelfile = infer.modelfile(tokenizer, "./some.gguf")
    names = [name for name, _ in read_modelfile(modelfile)]
    assert names == ["FROM", "TEMPLATE", "SYSTEM", *["PARAMETER"] * 4]
    meant = prompt.replace('"""', "”””")
    assert dict(read_modelfile(modelfile))["SYSTEM"] == meant
    text = filled(modelfile, SAID, "在吗")
    assert tokenizer.encode(text) == prompt_ids(tokenizer, "在吗", SAID, system=meant)


def test_a_template_whose_turns_are_not_alike_is_refused():
    with pytest.raises(CourseError, match=r"llama\.cpp 或 LM Studio"):
        infer.modelfile(family("qwen2_5", NOT_ALIKE), "./some.gguf")


README = "---\nlanguage: en\nlicense: {}\ntags: x\n---\n\n# A model\n\n---\nlicense: gpl\n---\n"


@pytest.fixture
def card(tmp_path):
    """The card of an adapter for a base of this name, with this README and config, on this tokenizer."""

    def make(base: str, readme: str | None = None, tokenizer: Path = TINY, **config) -> str:
        folder = tmp_path / base
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
        (tmp_path / "a.json").write_text("[]", encoding="utf-8")
        profile = replace(PROFILES["cpu-small"], model=base)
        manifest = {part: {} for part in HANDED_ON} | {"profile": asdict(profile), "persona": {}}
        course = Course(profile, "", tmp_path / "run", manifest)
        course.keep("model", folder)
        course.keep("data", tmp_path / "a.json")
        with course.making("tokenized", train_rows=9, eval_rows=1) as made:
            (made / "rows").write_text("rows", encoding="utf-8")
        with course.making("adapter") as made:
            shutil.copytree(tokenizer, made, dirs_exist_ok=True)
        return infer.model_card(course)

    return make


@pytest.mark.parametrize(
    ("base", "readme", "config", "license", "title"),
    [
        ("LLM-Research/Llama-3.2-3B-Instruct", README.format("llama3.2"), {}, "llama3.2", "Llama-3.2-"),
        ("LLM-Research/Meta-Llama-3-8B-Instruct", None, {}, "other", "Llama-3-"),
        ("my_model", README.format('"llama3.1"'), {"license": "mit"}, "llama3.1", "Llama-"),
        ("Qwen/Qwen2.5-0.5B-Instruct", README.format("apache-2.0"), {}, "apache-2.0", ""),
        ("Qwen/Qwen2.5-3B-Instruct", "# Qwen\n\n---\nlicense: mit\n---\n", {}, "other", ""),
        ("smollm2", "", {"license": "apache-2.0"}, "apache-2.0", ""),
        ("TinyLlama-1.1B-Chat", README.format("apache-2.0"), {}, "apache-2.0", ""),
        ("tiny_llama", None, json.loads((TINY / "config.json").read_text()), "cc-by-4.0", ""),
    ],
)  # fmt: skip
def test_the_license_is_the_one_that_the_base_came_with(card, base, readme, config, license, title):
    text = card(base, readme, **config)
    front = text.split("---")[1].strip().splitlines()
    assert front == [f"base_model: {base}", "library_name: peft", f"license: {license}"]
    assert f"\n# {title}{NAME} LoRA\n" in text
    assert ("Built with Llama" in text) == ("Llama 社区许可" in text) == bool(title)


def test_the_cards_cell_stops_where_an_answer_ends(card, tmp_path):
    """Where the base's own config lacks the end mark, and where the template has no system prompt."""
    for name, template in (("qwen2_5", None), ("qwen3", None), ("gemma3", NO_SYSTEM)):
        tokenizer = family(name, template)
        tokenizer.save_pretrained(tmp_path / name)
        own = {"eos_token_id": 1} if template else {"eos_token_id": [7, 1]}
        text = card(f"{name}-base", tokenizer=tmp_path / name, **own)
        cell, client = (ast.parse(code) for code in re.findall(r"```python\n(.*?)```", text, re.S))
        given = {
            word.arg: word.value
            for part in ast.walk(cell)
            for word in getattr(part, "keywords", [])
        }
        stops = {end_id(tokenizer), *([1] if template else [7, 1])}
        assert ast.literal_eval(given["eos_token_id"]) == sorted(stops)
        pad = tokenizer.convert_tokens_to_ids(pad_token(tokenizer))
        assert ast.literal_eval(given["pad_token_id"]) == pad
        assert "date_string" not in text
        for code in (cell, client):
            (said,) = (
                part.value
                for part in ast.walk(code)
                if isinstance(part, ast.Assign) and part.targets[0].id == "messages"
            )
            said = eval(ast.unparse(said), {"question": "你是谁？"})
            assert said == chat_messages("你是谁？", tokenizer)
