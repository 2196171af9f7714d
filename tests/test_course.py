import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import NOTEBOOKS

from huanhuan.course import Course, CourseError, choose_profile


def pretend_gpu(monkeypatch, name, gib, capability):
    properties = type("Properties", (), {"total_memory": gib * 2**30})
    monkeypatch.delenv("HUANHUAN_PROFILE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("gpu", "gib", "capability", "profile"),
    [
        ("Tesla T4", 14.56, (7, 5), "gpu-fp16"),
        ("NVIDIA A10", 22.5, (8, 6), "gpu-bf16"),
        ("NVIDIA H200", 139.8, (9, 0), "gpu-bf16"),
        ("GeForce RTX 3050", 8.0, (8, 6), "gpu-4bit"),
        ("Quadro P1000", 3.5, (6, 1), "cpu-tiny"),
    ],
)
def test_profile_by_real_capability(monkeypatch, gpu, gib, capability, profile):
    pretend_gpu(monkeypatch, gpu, gib, capability)
    chosen, reason = choose_profile()
    assert chosen == profile
    assert gpu in reason


def test_a_small_gpu_without_bitsandbytes_takes_the_small_model_and_says_why(monkeypatch):
    pretend_gpu(monkeypatch, "GeForce RTX 3050", 8.0, (8, 6))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    chosen, reason = choose_profile()
    assert chosen == "cpu-tiny" and "pip install bitsandbytes" in reason


def test_4_bits_on_a_card_without_bfloat16(monkeypatch, run_dir):
    pretend_gpu(monkeypatch, "GeForce GTX 1660", 6.0, (7, 5))
    course = Course.start()
    assert (course.profile.name, course.profile.dtype) == ("gpu-4bit", "float16")


def test_every_gpu_profile_has_the_tutorials_values():
    from huanhuan.course import PROFILES, ROWS_PER_STEP

    assert ROWS_PER_STEP == 4 * 4
    for profile in PROFILES.values():
        lora = (profile.lora_r, profile.lora_alpha, profile.lora_dropout, profile.max_length)
        assert lora == (8, 32, 0.1, 384)
        if profile.device == "cuda":
            assert (profile.epochs, profile.learning_rate) == (3, 1e-4)


@pytest.mark.parametrize("asked", ["", "cpu-tiny"])
def test_the_toys_rate_is_not_given_to_another_model(run_dir, monkeypatch, asked):
    monkeypatch.setenv("HUANHUAN_PROFILE", asked)
    assert Course.start().profile.learning_rate == 1.2e-3
    monkeypatch.setenv("HUANHUAN_MODEL", "Qwen/Qwen3-0.6B")
    course = Course.start()
    assert course.profile.name == (asked or "cpu-small")
    assert course.profile.model == "Qwen/Qwen3-0.6B"
    assert (course.profile.learning_rate, course.profile.micro_batch) == (5e-4, None)
    assert Course.start(learning_rate=1e-3).profile.learning_rate == 1e-3


@pytest.mark.parametrize("asked", ["gpu-bf16", "gpu-4bit", "mac"])
def test_a_profile_for_a_gpu_that_is_not_there_is_refused(run_dir, monkeypatch, asked):
    monkeypatch.setenv("HUANHUAN_PROFILE", asked)
    with pytest.raises(CourseError, match="用不了.*cpu-tiny"):
        Course.start()


def test_an_nvidia_card_with_a_torch_without_cuda_is_told_the_command(run_dir, monkeypatch):
    from huanhuan import setup

    monkeypatch.setenv("HUANHUAN_PROFILE", "")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: "there")
    chosen, reason = choose_profile()
    assert chosen == "cpu-tiny" and "pip install --upgrade --force-reinstall torch" in reason
    row = setup.check_machine(Course.start()).set_index("项目").loc["GPU"]
    assert row["看到的"] == "有，用不上" and "pip install" in row["怎么办"]


@pytest.mark.parametrize(
    "gib, bf16, model, dtype",
    [(8, True, "0.5B", "bfloat16"), (32, True, "1.5B", "bfloat16"), (32, False, "1.5B", "float32")],
)
def test_a_mac_takes_the_model_that_fits_and_a_precision_by_trial(
    run_dir, monkeypatch, gib, bf16, model, dtype
):
    monkeypatch.setenv("HUANHUAN_PROFILE", "")
    monkeypatch.setattr("huanhuan.course._has_mps", lambda: True)
    monkeypatch.setattr("huanhuan.course._memory_gib", lambda: gib)
    monkeypatch.setattr("huanhuan.course._computes_bf16", lambda device: bf16)
    profile = Course.start().profile
    assert (profile.name, profile.device, profile.dtype) == ("mac", "mps", dtype)
    assert model in profile.model


def test_a_rocm_card_is_seen_as_itself(monkeypatch):
    pretend_gpu(monkeypatch, "AMD Instinct MI210", 64, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    chosen, reason = choose_profile()
    assert chosen == "gpu-fp16" and "ROCm" in reason


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "2"}, "2"), ({"LOCAL_RANK": "1"}, "None")],
)
def test_one_process_sees_one_gpu(given, seen):
    code = "import os, huanhuan.course; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    plain = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=NOTEBOOKS,
        env=plain | given,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == seen, done.stderr


def test_unknown_profile_and_override_are_named(monkeypatch):
    with pytest.raises(CourseError, match="epoch.*可以改的有.*epochs"):
        Course.start(epoch=5)
    monkeypatch.setenv("HUANHUAN_PROFILE", "tpu")
    with pytest.raises(CourseError, match="tpu.*cpu-tiny"):
        Course.start()


def test_start_writes_nothing(run_dir):
    Course.start()
    assert not run_dir.exists()


def test_resume_says_what_to_run_first(run_dir, tmp_path):
    with pytest.raises(CourseError, match="请先运行 01_setup.ipynb"):
        Course.resume("data")
    Course.start().keep("data", __file__)
    assert Course.resume("data").path("data").name == "test_course.py"
    with pytest.raises(CourseError, match="请先运行 03_train_lora.ipynb"):
        Course.resume("data", "adapter")


def test_overrides_last_until_the_next_start(run_dir):
    Course.start(epochs=1).keep("data", __file__)
    assert Course.resume().profile.epochs == 1


def test_other_data_makes_later_results_stale(run_dir, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text("[]"), second.write_text("[]")
    course = Course.start()
    course.keep("data", first)
    (run_dir / "tokenized").mkdir()
    course.keep("tokenized", run_dir / "tokenized")

    again = Course.start()
    again.keep("data", first)
    assert Course.resume("tokenized")

    again.keep("data", second)
    with pytest.raises(CourseError, match="02_preprocess"):
        Course.resume("tokenized")
    assert (run_dir / "tokenized").exists()


def test_a_new_adapter_makes_old_answers_stale(run_dir):
    course = Course.start()
    for name in ("adapter", "answers", "adapter"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
        course.keep(name, run_dir / name)
    assert Course.resume("adapter")
    with pytest.raises(CourseError, match="04_infer"):
        Course.resume("answers")


def test_set_aside_never_overwrites(run_dir):
    course = Course.start()
    for content in ("first", "second", "third"):
        course.set_aside(run_dir / "llama3_lora")
        (run_dir / "llama3_lora").mkdir(parents=True)
        (run_dir / "llama3_lora" / "adapter").write_text(content)
    kept = {path.read_text() for path in run_dir.glob("llama3_lora*/adapter")}
    assert kept == {"first", "second", "third"}


def test_damaged_manifest_is_explained(run_dir):
    run_dir.mkdir()
    (run_dir / "manifest.json").write_text('{"profile": ')
    with pytest.raises(CourseError, match="manifest.json.*01_setup"):
        Course.resume()


def test_manifest_names_no_path_of_the_run_directory(finished_run):
    files = json.loads((finished_run.run_dir / "manifest.json").read_text(encoding="utf-8"))[
        "files"
    ]
    assert files["adapter"] == "llama3_lora"
    assert files["tokenized"] == "tokenized"
