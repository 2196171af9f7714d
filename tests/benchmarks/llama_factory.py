"""LLaMA-Factory's part of ``step.py``, in an environment of its own (its versions are not ours).

    python -m venv FOLDER; FOLDER/bin/pip install llamafactory==0.9.5 torch==2.13.0
    # where torch is a CPU build, its torchvision and torchaudio have to be CPU builds too, or absent;
    # it imports torchaudio, of which an empty module will do
    python tests/benchmarks/step.py --llamafactory FOLDER/bin/python

``step.py`` starts this as a server: every line it sends names a micro-batch, how many of them make
a step, a folder with the tokenised rows, one with the base model and one with the adapter. One step
is trained, the adapter saved in its place, and a line with seconds and loss comes back.
"""

import json
import os
import sys
import tempfile
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what it prints itself is no answer
os.environ["DISABLE_VERSION_CHECK"] = "1"
from llamafactory.train.tuner import run_exp  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


class Clock(TrainerCallback):
    def on_epoch_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.start


def one_step(micro_batch: int, passes: int, rows: str, model: str, adapter: str) -> dict:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "stage": "sft", "do_train": True, "finetuning_type": "lora", "template": "llama3",
            "model_name_or_path": model, "adapter_name_or_path": adapter, "tokenized_path": rows,
            "dataset": "none", "output_dir": folder, "max_steps": 1, "learning_rate": 1e-4,
            "lr_scheduler_type": "constant", "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": passes, "disable_gradient_checkpointing": True,
            "disable_shuffling": True, "lora_dropout": 0.0, "save_strategy": "no", "use_cpu": True,
            "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "flash_attn": "sdpa",
            "overwrite_output_dir": True, "cutoff_len": 2048,
        }  # fmt: skip
        run_exp(arguments, callbacks=[clock])
        with open(os.path.join(folder, "trainer_log.jsonl"), encoding="utf-8") as log:
            loss = next(json.loads(line)["loss"] for line in log if "loss" in line)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(os.path.join(folder, name), os.path.join(adapter, name))
    return {"seconds": clock.seconds, "loss": loss}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(one_step(**json.loads(line))), file=answers, flush=True)
