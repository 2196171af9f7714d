"""Fuzz what strangers send: does anything but a sentence come out?

    pip install atheris
    python tests/faults/fuzz.py reader|pack|manifest [CORPUS …] [-max_total_time=1800]

Coverage-guided (atheris, https://github.com/google/atheris, over libFuzzer, whose options these are).
`reader` gets a broken dataset, `pack` a pack whose members are broken but whose checksums mostly fit,
`manifest` a broken manifest.json for ``Course.resume`` and for everything that it lists. A CourseError is
an answer; any other exception, or more than 5 seconds or 1 GiB, ends the run and leaves the input.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(Path(__file__).parent)]
with atheris.instrument_imports(include=["huanhuan"], enable_loader_override=False):
    from huanhuan import CourseError, infer, reader
    from huanhuan.course import ARTEFACTS, Course

DATASETS = [
    '[{"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]}]',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3,
    '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]',
    '{"features": [], "rows": [{"row_idx": 0, "row": {"query": "a", "response": "b"}}]}',
    '{"columns": ["q", "a"], "index": [0], "data": [["a", "b"]]}',
    'question,answer\na,b\n"c,d",e\n',
    "甄嬛：你来了。\n皇上：朕来了。\n\n甄嬛：坐吧。\n皇上：好。\n",
]
WORDS = ['"messages"', '"role"', '"content"', '"history"', '"conversation"', '"human"', '"value"',
         '"rejected"', '"weight"', '"label"', "{{name}}", "null", "1e999", "[[", "\\ud800", "\\u0000",
         '"files"', '"known"', '"profile"', '"persona"', '"id"', '"reason"', "true", "-1", "{}"]  # fmt: skip


def targets(folder: Path, run) -> dict:
    """By name: what is done with the fuzzer's bytes, and the inputs that it begins with."""
    suffixes = [".json", ".jsonl", ".csv", ".txt"]
    with zipfile.ZipFile(run.pack) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}

    def read(data: bytes) -> None:
        file = folder / f"mine{suffixes[data[0] % 4] if data else '.json'}"
        file.write_bytes(data[1:])
        reader.load_rows(file)

    def unpack(data: bytes) -> None:
        """Broken by a few edits that the first bytes draw; the rest is what is written in."""
        draw, content = random.Random(data[:8]), dict(members)
        for _ in range(draw.randint(1, 3)):
            name, kind = draw.choice([*content]), draw.randrange(5)
            old = content[name]
            at = draw.randrange(min(len(old), draw.choice([16, 256, len(old) + 1])) + 1)
            if kind == 0:
                content[name] = old[:at] + data[8:] + old[at + len(data[8:]) :]
            elif kind == 1:
                content[name] = old[:at] + data[8:] + old[at:]
            elif kind == 2:
                content[name] = old[:at]
            elif kind == 3:
                content["llama3_lora/" + data[8:60].decode("utf-8", "replace")] = data
            elif len(content) > 1:
                del content[name]
        if draw.random() < 0.9:
            lines = [
                f"{hashlib.sha256(inside).hexdigest()}  {name.partition('/')[2]}\n"
                for name, inside in content.items()
                if not name.endswith("SHA256SUMS")
            ]
            content["llama3_lora/SHA256SUMS"] = "".join(lines).encode("utf-8", "replace")
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as packed:
            for name, inside in content.items():
                packed.writestr(name, inside)
        whole = bytearray(made.getvalue())
        if draw.random() < 0.2:
            whole[draw.randrange(len(whole))] = draw.randrange(256)
        (folder / "stranger.zip").write_bytes(whole)
        shutil.rmtree(folder / "local", ignore_errors=True)
        infer.unpack(folder / "stranger.zip", folder / "local")

    def resume(data: bytes) -> None:
        """The manifest as it comes; or with what the first bytes draw exchanged for the rest."""
        if data[:1] != b"{":
            draw, content = random.Random(data[:8]), json.loads(manifest)
            try:
                said = json.loads(data[8:])
            except (ValueError, RecursionError):
                said = data[8:].decode("utf-8", "replace")
            inner = content
            while isinstance(inner, dict) and inner:
                last, key = inner, draw.choice([*inner])
                inner = inner[key] if draw.random() < 0.7 else None
            last[key] = said
            data = json.dumps(content).encode()
        run.manifest.write_bytes(data)
        course = Course.resume()
        for name in ARTEFACTS:
            course.path(name)

    manifest = run.manifest.read_bytes()
    datasets = [b"\0" + text.encode() for text in DATASETS]
    datasets += [b"\2" + DATASETS[-2].encode(), b"\3" + DATASETS[-1].encode()]
    return {
        "reader": (read, datasets),
        "pack": (unpack, [bytes([n]) * 8 + b"{}" for n in range(32)]),
        "manifest": (resume, [manifest] + [bytes([n]) * 8 + b"{}" for n in range(64)]),
    }


def main() -> None:
    name = sys.argv.pop(1)
    warnings.simplefilter("ignore")
    os.environ.pop("HUANHUAN_PERSONA", None)
    os.environ["HUANHUAN_PROFILE"] = "cpu-tiny"
    from faults import Run, make_run

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    make_run(folder / "run")
    target, inputs = targets(folder, Run(folder / "run"))[name]

    def strike(data: bytes) -> None:
        with contextlib.suppress(CourseError):
            target(data)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(inputs):
        (corpus / str(number)).write_bytes(content)
    words = folder / "words"
    words.write_text("".join(f"{json.dumps(word)}\n" for word in WORDS), encoding="utf-8")
    options = [f"-dict={words}", "-timeout=5", "-rss_limit_mb=3072", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(corpus)], strike)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
