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


@pytest.fixture
def brought(run_dir, tmp_path):
    """A course with a dataset and a model, a file and a folder of a few bytes each."""
    data, model = tmp_path / "a.json", tmp_path / "model"
    data.write_text("[]")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    course = Course.start()
    course.keep("data", data)
    course.keep("model", model)
    return course, data, model


def make(course, *names):
    for name in names:
        content = f"{name} of {course.path('data').read_text()}"
        with course.making(name, made_by_test=1) as path:
            (path / "rows" if path.is_dir() else path).write_text(content)


ALL = ("tokenized", "adapter", "answers", "pack")


def test_what_is_made_is_taken_with_its_record(brought):
    course, *_ = brought
    make(course, *ALL)
    again = Course.resume(*ALL)
    assert again.path("adapter") == course.run_dir / "llama3_lora"
    record = again.record("adapter")
    assert record["results"] == {"made_by_test": 1}
    assert record["settings"]["lora_r"] == 8 and record["of"].keys() == {"model", "tokenized"}
    assert not [*course.run_dir.glob("unfinished*")]
    assert not [*course.run_dir.glob("*.lock")]


@pytest.mark.parametrize(
    "change, broken, says",
    [
        (lambda run, data, model: data.write_text("[1]"), "tokenized", "数据集.*01_setup"),
        (lambda run, data, model: (model / "model.safetensors").write_bytes(b"others!"),
         "adapter", "模型.*01_setup"),
        (lambda run, data, model: (run / "tokenized" / "rows").write_text("x"),
         "adapter", "处理好的数据.*02_preprocess"),
        (lambda run, data, model: (run / "llama3_lora" / "rows").unlink(),
         "pack", "适配器.*不完整.*03_train_lora"),
        (lambda run, data, model: (run / "llama3_lora" / "made.json").write_text("{"),
         "adapter", "03_train_lora"),
        (lambda run, data, model: Course.start(max_length=256).keep("data", data),
         "tokenized", "max_length=384.*256.*02_preprocess"),
        (lambda run, data, model: Course.start(lora_r=64).keep("data", data),
         "adapter", "lora_r=8.*64.*03_train_lora"),
    ],
)  # fmt: skip
def test_what_no_longer_holds_is_named_with_the_notebook_to_run(brought, change, broken, says):
    course, data, model = brought
    make(course, *ALL)
    change(course.run_dir, data, model)
    with pytest.raises(CourseError, match=says):
        Course.resume(broken)


def test_data_changed_and_listed_anew_asks_for_02_then_for_03_then_for_04(brought):
    course, data, _ = brought
    make(course, *ALL)
    data.write_text("[1]")
    Course.start().keep("data", data)
    for name, books in (("tokenized", "02"), ("adapter", "03"), ("answers", "04")):
        with pytest.raises(CourseError, match=books):
            Course.resume(name)
        make(Course.resume(), name)
        assert Course.resume(name)


def test_a_touched_file_is_the_same_file(brought):
    course, data, model = brought
    make(course, *ALL)
    for file in (data, model / "model.safetensors", course.run_dir / "llama3_lora" / "rows"):
        os.utime(file, (1, 1))
    assert Course.resume(*ALL)
    (course.run_dir / "llama3_lora" / "scores.json").write_text("{}")
    (course.run_dir / "llama3_lora" / ".ipynb_checkpoints").mkdir()
    assert Course.resume(*ALL)


def test_a_persona_of_another_prompt_asks_for_02(brought, monkeypatch):
    course, *_ = brought
    make(course, "tokenized")
    monkeypatch.setattr("huanhuan.course.SYSTEM_PROMPT", "你是别人")
    with pytest.raises(CourseError, match="system_prompt.*02_preprocess"):
        Course.resume("tokenized")


@pytest.mark.parametrize("name", ALL)
def test_what_fails_while_it_is_made_leaves_the_former_one(brought, name):
    course, *_ = brought
    make(course, *ALL)
    before = {p: p.read_bytes() for p in course.run_dir.rglob("*") if p.is_file()}
    with pytest.raises(KeyboardInterrupt), course.making(name) as path:
        (path / "rows" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt
    assert Course.resume(*ALL)
    assert all(p.read_bytes() == content for p, content in before.items())
    make(course, name)  # the half-made is cleared away
    assert not [*course.run_dir.glob("unfinished*")]
    assert len([*course.run_dir.glob(course.path(name).stem + "-*")]) >= 1  # the former one


def test_a_manifest_that_leads_out_of_the_run_directory_is_not_followed(brought, tmp_path):
    course, *_ = brought
    make(course, *ALL)
    file = course.run_dir / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    for lie in (str(tmp_path), "../x", "tokenized"):
        manifest["files"]["adapter"] = lie
        file.write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(CourseError, match="03_train_lora"):
            Course.resume("adapter")


def test_a_full_and_a_read_only_disk_are_sentences(brought):
    course, *_ = brought
    for number, says in ((28, "磁盘满了.*HUANHUAN_OUTPUT"), (30, "不能写.*HUANHUAN_OUTPUT")):
        with pytest.raises(CourseError, match=says), course.making("tokenized"):
            raise OSError(number, "no")
    with pytest.raises(CourseError, match="还缺少"):
        Course.resume("tokenized")


HOLD = """
import sys, time
sys.path.insert(0, {notebooks!r})
from huanhuan.course import Course
with Course.resume().locked("训练"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_kernel_is_told_who_writes_and_a_dead_one_holds_nothing(brought, run_dir):
    course, *_ = brought
    command = [sys.executable, "-c", HOLD.format(notebooks=str(NOTEBOOKS))]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(CourseError, match=f"进程 {other.pid}.*训练"),
            course.making("tokenized"),
        ):
            pass
        course.finish("01_setup")  # the list itself is written all the same
    finally:
        other.kill()
        other.wait()
    make(course, "tokenized")
    (run_dir / "run.lock").write_text("{")  # a crash while it was written
    os.utime(run_dir / "run.lock", (1, 1))
    make(course, "tokenized")


def test_eight_hundred_writes_from_eight_processes_lose_nothing(brought, run_dir):
    program = f"""
import sys
sys.path.insert(0, {str(NOTEBOOKS)!r})
from huanhuan.course import Course
course = Course.resume()
for i in range(100):
    course._change(lambda m: m["notebooks"].update({{sys.argv[1] + str(i): 1}}))
"""
    crowd = [subprocess.Popen([sys.executable, "-c", program, f"{n}-"]) for n in range(8)]
    assert [one.wait() for one in crowd] == [0] * 8
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["notebooks"]) == 800


@pytest.mark.parametrize(
    "given",
    [{"epochs": 0}, {"epochs": "3"}, {"epochs": 10**9}, {"lora_r": -1}, {"lora_r": True},
     {"learning_rate": float("nan")}, {"model": " "}, {"quantized": 1}, {"max_length": 3}],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_sentence_in_01(run_dir, given):
    with pytest.raises(CourseError, match="不行：要写"):
        Course.start(**given)


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
