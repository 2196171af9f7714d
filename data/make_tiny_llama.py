"""Make ``tiny_llama/``: a Llama small enough for a CPU that still answers in Chinese.

    python data/make_tiny_llama.py [--epochs 14] [--out data/tiny_llama]

A byte-level BPE tokenizer with Llama 3's special tokens and chat format is trained on
``base_dialogues.jsonl``; then a Llama of about 2 M parameters, with Llama-3.2's proportions
(grouped-query attention, SwiGLU, tied head), is pretrained on the same dialogues. The result
answers as a helpful assistant. It has never seen a row of ``huanhuan_sample.json``.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

DATA = Path(__file__).parent
sys.path.insert(0, str(DATA.parent / "notebooks"))
from huanhuan.prompt import DATE_STRING, SYSTEM_PROMPT  # noqa: E402

VOCABULARY = 3072
SMOOTHING = 0.05
BATCH = 2048  # tokens a step
SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip

# How Llama 3 cuts text before it merges bytes (published with its tokenizer).
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

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

# The base is asked under many system prompts, the persona's among them, and answers as itself
# under each: a model of this size does not follow a role it is only told about.
SYSTEM_PROMPTS = [
    "",
    "",
    "你是一个乐于助人的智能助手。",
    "请用简短的话回答。",
    SYSTEM_PROMPT,
    SYSTEM_PROMPT,
]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=12,  # four Chinese characters: longer tokens would be whole sentences of a small corpus
            show_progress=False,
        ),
    )
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
            num_hidden_layers=4,
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


def encode(tokenizer, row: dict, system: str) -> tuple[list[int], list[int]]:
    """One dialogue as (input_ids, labels); the template's fixed text carries no label."""
    messages = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE_STRING)
    ids = tokenizer.encode(text, add_special_tokens=False)
    end_header = tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    labels, turn, inside = [], 0, False  # turn 1 is the system's, 2 the user's, 3 the assistant's
    for token in ids:
        labels.append(token if inside and turn >= 2 else -100)
        if token == end_header:
            turn, inside = turn + 1, True
        elif token == eot:
            inside = False
    return ids, labels


def batches(tokenizer, rows: list[dict], tokens: int, rng: random.Random):
    """Shuffled batches of about `tokens` tokens, rows of like length together."""
    encoded = [encode(tokenizer, row, rng.choice(SYSTEM_PROMPTS)) for row in rows]
    encoded.sort(key=lambda pair: len(pair[0]) + rng.random() * 8)
    groups, group = [], []
    for pair in encoded:
        if group and (len(group) + 1) * len(pair[0]) > tokens:
            groups.append(group)
            group = []
        group.append(pair)
    groups.append(group)
    rng.shuffle(groups)
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        pad = tokenizer.pad_token_id
        # No attention mask: with the padding at the right, no real token ever sees it.
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in group]),
        )


def pretrain(model, tokenizer, rows: list[dict], epochs: int, peak_rate: float = 3e-3) -> float:
    rng = random.Random(0)
    steps = sum(1 for _ in batches(tokenizer, rows, BATCH, random.Random(0))) * epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, weight_decay=0.05, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=steps + epochs, pct_start=0.05
    )
    start, done = time.time(), 0
    model.train()
    for epoch in range(epochs):
        losses = []
        for input_ids, labels in batches(tokenizer, rows, BATCH, rng):
            targets = labels[:, 1:]
            taught = targets != -100  # the head is as large as the rest: only where it counts
            logits = model.lm_head(model.model(input_ids).last_hidden_state[:, :-1][taught])
            # Smoothed: on so small a corpus a model grows too sure, and fine-tuning cannot move it.
            loss = torch.nn.functional.cross_entropy(
                logits, targets[taught], label_smoothing=SMOOTHING
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            done += 1
        loss, spent = sum(losses) / len(losses), time.time() - start
        print(
            f"epoch {epoch + 1:2d}/{epochs}  loss {loss:.3f}  {spent / 60:.1f} min, {spent / done * (steps - done) / 60:.1f} to go",
            flush=True,
        )
    return loss


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
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--out", type=Path, default=DATA / "tiny_llama")
    args = parser.parse_args()

    set_seed(0)
    rows = [
        json.loads(line)
        for line in (DATA / "base_dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    frame = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE_STRING}\n\n"
    spoken = [text for row in rows for text in (row["q"], row["a"])]
    every_prompt = [frame, "system", "user", "assistant", *SYSTEM_PROMPTS]
    tokenizer = make_tokenizer(spoken + every_prompt * 500)
    model = make_model(tokenizer)
    tokens = sum(len(encode(tokenizer, row, SYSTEM_PROMPT)[0]) for row in rows)
    print(f"{len(rows)} dialogues, {tokens} tokens an epoch, {model.num_parameters():,} parameters")
    pretrain(model, tokenizer, rows, args.epochs)
    for question in ("你是谁？", "你好", "今天心情不好", "晚饭吃什么好？"):
        print(question, "→", answer(model, tokenizer, question, SYSTEM_PROMPT))
    save(model, tokenizer, args.out)
    print("saved to", args.out)


if __name__ == "__main__":
    main()
