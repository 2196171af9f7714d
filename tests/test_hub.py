import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, run_course
from hub import Hub

MODEL_ID = "LLM-Research/Llama-3.2-3B-Instruct"
OLDEST = "1.23.0"  # the lower end of requirements.txt


@pytest.mark.parametrize("client", [OLDEST, "installed"])
def test_the_course_runs_on_what_the_real_client_downloads(tmp_path, client):
    """01's download from a hub, then 02 to 04 on the folder that it returned."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "data" / "tiny_llama", folder)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"twice the download")
    rows = json.loads((ROOT / "data" / "huanhuan_sample.json").read_text(encoding="utf-8"))
    (tmp_path / "rows.json").write_text(json.dumps(rows[:32]))

    environment = {
        "HUANHUAN_MODEL": MODEL_ID,
        "HUANHUAN_DATA": str(tmp_path / "rows.json"),
        "HUANHUAN_OUTPUT": str(tmp_path / "run"),
    }
    if client != "installed":
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(tmp_path / "client"),
        ]
        subprocess.run([*pip, f"modelscope=={client}"], check=True)
        environment["PYTHONPATH"] = str(tmp_path / "client")
    with Hub(MODEL_ID, folder) as hub:
        environment |= hub.environment(tmp_path / "cache")
        done = run_course("01_setup", "02_preprocess", "03_train_lora", "04_infer", **environment)
        hub.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr

    for path in (tmp_path / "run" / "executed").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert "Warning" not in output.get("text", ""), (path.name, cell.id, output.text)

    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    model_dir = manifest["files"]["model"]
    assert model_dir.startswith(str(tmp_path / "cache"))
    assert not os.path.exists(os.path.join(model_dir, "original"))
    assert not any("original" in path for path in hub.requests if "FilePath" in path)
    if client != "installed":
        assert manifest["versions"]["modelscope"] == client
    config = json.loads(
        (tmp_path / "run" / "llama3_lora" / "adapter_config.json").read_text(encoding="utf-8")
    )
    assert config["base_model_name_or_path"] == MODEL_ID
