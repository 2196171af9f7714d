import io
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from huanhuan import setup, show
from huanhuan.course import Course, CourseError
from huanhuan.reader import load_rows

TINY = ROOT / "data" / "tiny_llama"


def test_dataset_typed_then_named_then_uploaded_then_sample(run_dir, tmp_path, monkeypatch):
    course = Course.start()
    files = {name: tmp_path / f"{name}.json" for name in ("typed", "named")}
    for path in files.values():
        path.write_text("[]")
    assert setup.dataset_file(course) == ROOT / "data" / "huanhuan_sample.json"
    (run_dir / "uploads").mkdir(parents=True)
    (run_dir / "uploads" / "mine.json").write_text("[]")
    assert setup.dataset_file(course).name == "mine.json"
    monkeypatch.setenv("HUANHUAN_DATA", str(files["named"]))
    assert setup.dataset_file(course) == files["named"]
    assert setup.dataset_file(course, str(files["typed"])) == files["typed"]
    with pytest.raises(CourseError, match="nowhere.json"):
        setup.dataset_file(course, "nowhere.json")


def test_model_folder_or_hub_id():
    assert setup.local_folder(str(TINY)) == str(TINY)
    assert setup.local_folder("LLM-Research/Llama-3.2-3B-Instruct") is None
    for nowhere in ("../nowhere", "a/b/c", "nowhere", "~/nowhere", "a b/c", "D:\\models\\x", ""):
        with pytest.raises(CourseError, match="找不到模型目录"):
            setup.local_folder(nowhere)


def test_a_model_cut_off_while_downloading_is_noticed(tmp_path):
    assert "模型完整" in setup.check_model(TINY)
    for file in TINY.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CourseError, match=r"缺少 model.safetensors"):
        setup.check_model(tmp_path)
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(TINY / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CourseError, match=r"缺少 model-00002-of-00002.safetensors"):
        setup.check_model(tmp_path)


def test_machine_check_gives_a_fix_for_what_does_not_pass(run_dir, monkeypatch):
    table = setup.check_machine(Course.start())
    assert set(table["结果"]) <= {"通过", "提醒", "不行"}
    assert (table["怎么办"] != "")[table["结果"] != "通过"].all()
    assert {"Python", "transformers", "GPU", "可用内存", "可用磁盘"} <= set(table["项目"])


def test_only_missing_packages_are_installed_and_never_torch(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(setup, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: calls.append(command) or subprocess.CompletedProcess(command, 0),
    )
    setup.REQUIREMENTS.write_text("# a comment\ntorch\npandas>=2.0\nnot_a_package>=1\n")
    setup.install_missing()
    assert [command[-1] for command in calls] == ["not_a_package>=1"]
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CourseError, match="PyTorch"):
        setup.install_missing()
    assert len(calls) == 1


def uploaded(content: bytes, version: int):
    if version == 7:
        return {"mine.json": {"metadata": {"name": "mine.json"}, "content": content}}
    return (
        {"name": "mine.json", "type": "", "size": len(content), "content": memoryview(content)},
    )


@pytest.mark.parametrize("version", [7, 8])
def test_upload_is_kept_only_when_it_is_good(run_dir, version):
    row = {"instruction": "你好", "input": "", "output": "你好。", "source": "自己写的"}
    more = {"instruction": "再见", "input": "", "output": "再见。"}
    box = show.file_picker(Course.start(), check=load_rows)
    button, said = box.children
    receive = button._trait_notifiers["value"]["change"][-1]

    receive({"new": uploaded(json.dumps([row, {"instruction": "a"}]).encode(), version)})
    assert "第 2 条" in said.value and "output" in said.value
    assert not run_dir.exists()

    for answer in ("一", "二"):
        rows = [row | {"output": answer}, more]
        receive({"new": uploaded(json.dumps(rows).encode(), version)})
        assert "收到 mine.json" in said.value and "source" in said.value
    kept = sorted((run_dir / "uploads").iterdir(), key=lambda path: path.stat().st_mtime)
    assert [json.load(io.BytesIO(path.read_bytes()))[0]["output"] for path in kept] == ["一", "二"]
    assert kept[-1].name == "mine.json"


def test_without_widgets_the_picker_says_how_to_go_on(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert show.file_picker(Course.start(), check=load_rows) is None
    assert "写上文件的路径" in capsys.readouterr().out


def test_placeholders_are_filled_beside_the_file_that_was_brought_or_asked_for(run_dir, tmp_path):
    rows = [
        {"instruction": "你是谁？", "input": "", "output": "我是 {{name}}，由 {{author}} 写成。"},
        {"instruction": "叫什么？", "input": "", "output": "叫我 {{name}}。"},
    ]
    brought = tmp_path / "identity.json"
    brought.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    before, course = brought.read_bytes(), Course.start()
    with pytest.raises(CourseError, match=r"\{\{author\}\}（1 条）"):
        setup.without_placeholders(course, brought, load_rows(brought), {"{{name}}": "甄嬛"})
    values = {"{{name}}": "甄嬛", "{{author}}": "我们"}
    path, filled = setup.without_placeholders(course, brought, load_rows(brought), values)
    assert path.is_relative_to(course.run_dir) and brought.read_bytes() == before
    assert filled["output"].tolist() == ["我是 甄嬛，由 我们 写成。", "叫我 甄嬛。"]
    again = load_rows(path)
    assert again["output"].tolist() == filled["output"].tolist()
    assert again.attrs["placeholders"] == {}
    assert setup.without_placeholders(course, path, again, {})[0] == path
