"""Make ``tiny_llama/``: a Llama small enough for a CPU that still speaks, of a small everyday world.

    python data/make_tiny_llama.py [--out data/tiny_llama]

The tokenizer has Llama 3's special tokens and chat format, and a token for every common Chinese
character. A Llama of about 3 M parameters, with Llama-3.2's proportions (grouped-query attention,
SwiGLU, tied head), is pretrained on dialogues that ``make_dialogues.py`` composes on the way: as an
assistant, and as whoever its system prompt names. Stopped, it goes on where it was.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

DATA = Path(__file__).parent
sys.path.insert(0, str(DATA.parent / "notebooks"))
from make_dialogues import COMMON, PIECES, dialogues  # noqa: E402

from huanhuan.prompt import DATE_STRING  # noqa: E402

SMOOTHING = 0.05
BATCH = 2048  # tokens a step, padding included
CHUNK = 4000  # dialogues composed at a time; between two chunks the state is saved
# All topics alike, until the rate has fallen to a sixth of its peak; then the drill, for to copy a name
# and to reckon are learned late, and by many examples. (Steps, of so many planned, peak of the rate.)
ROUNDS = ((10_644, 14_500, 2e-3), (7_000, 7_000, 8e-4))
DRILL = 49  # the chunk with which the second begins
QUESTIONS_TAUGHT = 0.3  # of the dialogues: there the questions count as well as the answers
SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip

# How Llama 3 cuts text before it merges bytes (published with its tokenizer).
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

FRAME = "Cutting Knowledge Date: December 2023\nToday Date: "
# Words of the chat format that are one token each.
WORDS = ["system", "user", "assistant", "\n\n", ":", "--"] + [
    "Cutting", " Knowledge", " Date", " December", "202", "Today", " Jul", "26", "\nToday",
]  # fmt: skip

MARKS = "，。！？、；：…—“”‘’（）《》～"

# Renders system, user and assistant turns to the same text as Llama 3.2's own template.
CHAT_TEMPLATE = """\
{%- if date_string is not defined -%}
    {%- if strftime_now is defined -%}{%- set date_string = strftime_now("%d %b %Y") -%}
    {%- else -%}{%- set date_string = "26 Jul 2024" -%}{%- endif -%}
{%- endif -%}
{%- set turns = messages -%}{%- set system = "" -%}
{%- if messages and messages[0].role == "system" -%}
    {%- set system = messages[0].content | trim -%}{%- set turns = messages[1:] -%}
{%- endif -%}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: " -}}
{{- date_string + "\\n\\n" + system + "<|eot_id|>" -}}
{%- for turn in turns -%}
    {{- "<|start_header_id|>" + turn.role + "<|end_header_id|>\\n\\n" + turn.content | trim + "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}{%- endif -%}
"""


def bytes_of(text: str) -> list[str]:
    """`text` as byte-level BPE sees it: a printable character for each byte of its UTF-8."""
    ((piece, _),) = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)
    return list(piece)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make each common character, and each of WORDS, one token.

    Not trained: merges counted on a small corpus would be whole phrases of it, and cut the rest
    into bytes. `texts`: characters beyond ASCII that occur there are common as well.
    """
    characters = dict.fromkeys([*COMMON, *MARKS, *sorted({c for t in texts for c in t if c > "~"})])
    vocabulary = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges = {}
    for text in [*WORDS, *characters]:
        whole, *rest = bytes_of(text)
        for part in rest:
            merges[whole, part] = None
            whole += part
            vocabulary[whole] = None
    core = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, list(merges), ignore_merges=False
        )
    )
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    bos = SPECIAL[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            license="cc-by-4.0",
        )
    )
    stop = [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    ]
    model.generation_config = GenerationConfig(  # what Llama-3.2-3B-Instruct ships with
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    return model


def encode(tokenizer, drawn: list[dict], rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """Each dialogue as (input_ids, labels): labels on its answers, and on some dialogues' questions."""

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    texts, taught = [], []
    for one in drawn:
        frame = SPECIAL[0] + header("system") + FRAME + f"{DATE_STRING}\n\n"
        parts = [(frame + one["system"] + "<|eot_id|>", False)]
        both = rng.random() < QUESTIONS_TAUGHT
        for question, answer in one["turns"]:
            parts += [(header("user"), False), (question + "<|eot_id|>", both)]
            parts += [(header("assistant"), False), (answer + "<|eot_id|>", True)]
        texts += [text for text, _ in parts]
        taught.append([flag for _, flag in parts])
    # Part by part, as prompt.prompt_ids does: no merge reaches over a special token anyway.
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    rows = []
    for flags in taught:
        ids, labels = [], []
        for flag in flags:
            part = next(encoded).ids
            ids += part
            labels += part if flag else [-100] * len(part)
        rows.append((ids, labels))
    return rows


def batches(tokenizer, chunk: int):
    """Shuffled batches of about BATCH tokens out of chunk number `chunk`, rows of like length together."""
    rng, source = random.Random(chunk), dialogues(seed=chunk, drill=chunk >= DRILL)
    rows = encode(tokenizer, [next(source) for _ in range(CHUNK)], rng)
    rows.sort(key=lambda row: len(row[0]) + rng.random() * 4)
    groups = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > BATCH:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    pad = tokenizer.pad_token_id
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        # No attention mask: with the padding at the right, no real token ever sees it.
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in group]),
        )


def pretrain(model, tokenizer, state: Path) -> None:
    """Train through ROUNDS, saving to `state` after every chunk, and from there on if it is there."""
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    saved = torch.load(state, weights_only=True) if state.exists() else None
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        print(f"goes on after step {saved['done']} of round {saved['round'] + 1}")
    chunk = saved["chunk"] if saved else 0
    for number, (steps, planned, peak) in enumerate(ROUNDS):
        if saved and number < saved["round"]:
            continue
        done = 0
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=planned + 1, pct_start=0.04
        )
        if saved and number == saved["round"]:
            done = saved["done"]
            schedule.load_state_dict(saved["schedule"])
        start, begun = time.time(), done
        while done < steps:
            done, loss = train_on(chunk, model, tokenizer, optimizer, schedule, done, steps)
            chunk += 1
            spent = (time.time() - start) / 60
            left = spent / (done - begun) * (steps - done)
            print(
                f"round {number + 1}, step {done}/{steps}  loss {loss:.3f}  "
                f"{spent:.1f} min, {left:.1f} to go",
                flush=True,
            )
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            content = {name: part.state_dict() for name, part in parts.items()}
            beside = state.with_suffix(".new")
            torch.save(content | {"round": number, "done": done, "chunk": chunk}, beside)
            beside.replace(state)


def train_on(
    chunk: int, model, tokenizer, optimizer, schedule, done: int, steps: int
) -> tuple[int, float]:
    """Updates on the batches of a chunk, `steps` at most: how many are done then, and their mean loss."""
    losses = []
    model.train()
    for input_ids, labels in batches(tokenizer, chunk):
        targets = labels[:, 1:]
        taught = targets != -100  # the head is as large as the rest: only where it counts
        logits = model.lm_head(model.model(input_ids).last_hidden_state[:, :-1][taught])
        # Smoothed: on so regular a corpus a model grows too sure, and fine-tuning cannot move it.
        loss = torch.nn.functional.cross_entropy(logits, targets[taught], label_smoothing=SMOOTHING)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        done += 1
        if done == steps:
            break
    return done, sum(losses) / len(losses)


def save(model, tokenizer, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a tokenizer class that 4.x does not know; this name both can read.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def answer(model, tokenizer, question: str, system: str) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        date_string=DATE_STRING,
    )
    out = model.eval().generate(
        **inputs, max_new_tokens=100, do_sample=False, temperature=None, top_p=None
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "tiny_llama")
    args = parser.parse_args()

    set_seed(0)
    written = [path.read_text(encoding="utf-8") for path in sorted(PIECES.glob("*.txt"))]
    tokenizer = make_tokenizer(written)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    state = args.out.with_name(args.out.name + ".pretraining")
    pretrain(model, tokenizer, state)
    for system in ("你是一个乐于助人的智能助手。", "现在你要扮演山里的猎人--石小满"):
        for question in ("你是谁？", "你好", "今天心情不好", "晚饭吃什么好？"):
            print(question, "→", answer(model, tokenizer, question, system))
    save(model, tokenizer, args.out)
    state.unlink()
    print("saved to", args.out)


if __name__ == "__main__":
    main()
