"""The notebooks as a whole: their steps, their form, and what happens when they are run."""

import ast
import html
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import nbformat
import psutil
import pytest
from conftest import NOTEBOOKS, ROOT, run_course

BOOKS = sorted(NOTEBOOKS.glob("0*.ipynb"))
SOURCES = {path.stem: nbformat.read(path, as_version=4) for path in BOOKS}
CELLS = [(name, cell) for name, book in SOURCES.items() for cell in book.cells]

STEPS = [
    "1.1-gpu-environment",
    "1.2-create-notebook",
    "1.3-rename",
    "1.3-add-cell",
    "1.4-upload-dataset",
    "1.4.1-imports",
    "1.4.1-dataset",
    "1.4.1-download",
    "1.4.2-tokenizer",
    "1.4.2-process-func",
    "1.4.2-map",
    "1.4.2-decode",
    "1.4.2-load-model",
    "1.4.2-lora-config",
    "1.4.2-peft-model",
    "1.4.2-training-arguments",
    "1.4.2-trainer",
    "1.4.2-train",
    "1.4.2-save",
    "1.4.3-result",
    "1.4.4-load-model",
    "1.4.4-load-adapter",
    "1.4.4-messages",
    "1.4.4-chat-template",
    "1.4.4-generate",
    "1.4.4-decode",
    "1.4.5-empty-cache",
    "2-download-adapter",
    "2-run-locally",
    "2-other-questions",
]


def test_every_step_of_the_tutorial_once_and_in_order():
    tags = [
        tag
        for _, cell in CELLS
        for tag in cell.metadata.get("tags", [])
        if tag.startswith("tutorial-")
    ]
    assert tags == [f"tutorial-{step}" for step in STEPS]


def test_five_notebooks_stored_clean():
    assert [path.stem[:2] for path in BOOKS] == ["01", "02", "03", "04", "05"]
    for name, book in SOURCES.items():
        nbformat.validate(book)
        assert book.metadata.kernelspec.name == "python3", name
    ids = [cell.id for _, cell in CELLS]
    assert len(ids) == len(set(ids))
    for name, cell in CELLS:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, (name, cell.id)


def test_a_code_cell_fits_the_screen():
    for name, book in SOURCES.items():
        lines = {c.id: len(c.source.splitlines()) for c in book.cells if c.cell_type == "code"}
        assert not [id for id, count in lines.items() if count > 16], name
        assert statistics.median(lines.values()) <= 7, name


MAIN_LINE = {"01_setup": 22, "02_preprocess": 36, "03_train_lora": 40, "04_infer": 35}


def test_a_first_pass_is_short():
    """What is left without the exercises and the sections that may be skipped."""
    for name, book in SOURCES.items():
        count, skipped = 0, False
        for cell in book.cells:
            if cell.id.startswith("exercise-"):
                continue
            if cell.cell_type == "markdown":
                for heading in re.findall(r"^##? .+", cell.source, re.M):
                    skipped = "选读" in heading
            count += not skipped
        assert count <= MAIN_LINE.get(name, 18), (name, count)


def test_no_absolute_paths_and_no_profile_names_in_code():
    for name, cell in CELLS:
        if cell.cell_type == "code" and "solution" not in cell.metadata.get("tags", []):
            text = re.sub(r"/content/drive[\w/-]*", "", cell.source)  # where Colab mounts Drive
            assert not re.search(r"[\"'](/\w|[A-Z]:\\)", text), (name, cell.id)
            assert "cpu-tiny" not in text and "trust_remote_code" not in text, (name, cell.id)


def test_a_notebook_imports_its_own_room_and_the_ground_floor():
    ground = {"course", "persona", "prompt", "show", "exercises", "CourseError", "NOTEBOOKS"}
    # 01 also checks the dataset, before 6 GB are downloaded for it
    rooms = {"01_setup": {"setup", "reader"}, "02_preprocess": {"preprocess", "reader"}}
    for name, book in SOURCES.items():
        code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
        used = set(re.findall(r"from huanhuan\.(\w+) import", code))
        for line in re.findall(r"from huanhuan import (.+)", code):
            used |= {word.strip() for word in line.split(",")}
        assert used <= ground | rooms.get(name, {name[3:].split("_")[0]}), name


def test_every_experiment_shows_something_and_leaves_a_sentence():
    """No `assert` on what a learner's own data or model shows: what is unexpected is said."""
    count = 0
    for book in SOURCES.values():
        for cell, after in zip(book.cells, book.cells[1:], strict=False):
            if "experiment" in cell.metadata.get("tags", []):
                count += 1
                assert re.search(r"print\(|show\.|DataFrame", cell.source), cell.id
                assert "**记住**：" in after.source, cell.id
    assert count >= 8


def calls_with_keywords(source: str):
    """(what is called, names of its keyword arguments) for every call of `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords if keyword.arg]
            if names:
                yield ast.unparse(node.func), names


def imported(source: str) -> dict[str, object]:
    """What the names bound by `source`'s imports stand for."""
    names = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name.split(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.split(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name, None)
                names[alias.asname or alias.name] = (
                    importlib.import_module(f"{node.module}.{alias.name}")
                    if value is None
                    else value
                )
    return names


def test_every_keyword_argument_exists_in_the_installed_libraries():
    """Run with the newest and with the oldest set, so that no notebook leans on one of them."""
    import datasets
    import pandas
    import peft
    import transformers

    kinds = {  # what the notebooks' variables are
        "model": peft.PeftModel, "base": transformers.LlamaForCausalLM, "trainer": transformers.Trainer,
        "trainer.model": peft.PeftModel, "tokenizer": transformers.PreTrainedTokenizerFast,
        "df": pandas.DataFrame, "answers": pandas.DataFrame, "texts": datasets.DatasetDict,
        "tokenized": datasets.DatasetDict, "model.eval()": peft.PeftModel, "trial": transformers.Trainer,
    }  # fmt: skip
    generation = vars(transformers.GenerationConfig()) | {"input_ids": None, "attention_mask": None}
    sources = {path.name: path.read_text("utf-8") for path in (NOTEBOOKS / "huanhuan").glob("*.py")}
    for name, book in SOURCES.items():
        cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
        sources[name] = "\n".join(
            re.sub(r"^.*google\.colab import.*$", "    pass", c, flags=re.M) for c in cells
        )
    checked, wrong = 0, []
    for name, source in sources.items():
        known = imported(source) | kinds
        for called, keywords in calls_with_keywords(source):
            owner, _, method = called.rpartition(".")
            target = kinds[called].forward if called in kinds else known.get(called)
            target = target or getattr(known.get(owner), method, None)
            if target is None and "." in owner:  # torch.nn.functional.cross_entropy
                target = known.get(owner.split(".")[0])
                for part in called.split(".")[1:]:
                    target = getattr(target, part, None)
            try:
                parameters = inspect.signature(target).parameters
            except (TypeError, ValueError):
                continue
            accepted = set(generation) if method == "generate" else set(parameters)
            takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
            if method != "generate" and takes_any:
                continue  # from_pretrained and the like: the notebooks' own run tells
            checked += len(keywords)
            wrong += [(name, called, keyword) for keyword in keywords if keyword not in accepted]
    assert not wrong
    assert checked > 80


def test_one_list_of_packages():
    required = [
        line.strip()
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    required = [line for line in required if line and not line.startswith("#")]
    conda = re.findall(
        r'^ {6}- "(.+)"$', (ROOT / "environment.yml").read_text(encoding="utf-8"), re.M
    )
    assert conda == required
    assert "torch" in required  # without a version: a platform's own torch fits its driver

    from packaging.requirements import Requirement

    exact = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    )
    for line in required:
        need = Requirement(line)
        assert need.specifier.contains(exact[need.name]), line


@pytest.mark.newest
def test_make_lab_shows_the_notebooks_with_their_pictures(tmp_path):
    """JupyterLab serves nothing above the folder it was started in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"allow_root": True, "open_browser": False, "port": port}
    (tmp_path / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": settings}))
    log = tmp_path / "lab.log"
    lab = subprocess.Popen(
        ["make", "lab"], cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_TOKEN": "test"},
        start_new_session=True,
    )  # fmt: skip

    def get(path: str) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/{path}?token=test") as answer:
            return answer.read()

    try:
        for _ in range(240):
            assert lab.poll() is None, log.read_text()
            try:
                get("api")
                break
            except OSError:
                time.sleep(0.25)
        for name, cell in CELLS:
            for target in re.findall(r"\]\(([\w./-]+)\)", cell.source):
                file = (NOTEBOOKS / target).resolve()
                assert get(f"files/{file.relative_to(ROOT)}") == file.read_bytes(), (name, target)
    finally:
        os.killpg(lab.pid, signal.SIGTERM)
        lab.wait()


def test_every_notebook_and_test_is_run_by_ci():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for runner in (ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "cpu.yml"):
        assert re.search(r"make test$[^#]*make test-oldest$", runner.read_text("utf-8"), re.M)
    assert "make test-gpu" in (ROOT / ".github" / "workflows" / "gpu.yml").read_text(
        encoding="utf-8"
    )
    assert re.search(
        r"^test:.*\n(\t.*\n)*\t\$\(BIN\)/pytest$", makefile, re.M
    )  # no path: all of testpaths
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    for path in [*BOOKS, *(ROOT / "tests").glob("test_*.py")]:
        assert path.relative_to(ROOT).as_posix() in found, path


@pytest.mark.parametrize(
    ("notebook", "first"),
    [
        ("02_preprocess", "01_setup"),
        ("03_train_lora", "01_setup"),
        ("04_infer", "01_setup"),
        ("05_cleanup", "01_setup"),
    ],
)
def test_out_of_order_says_what_to_run_first(tmp_path, notebook, first):
    done = run_course(notebook, HUANHUAN_OUTPUT=str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.strip() == f"⛔ 这里还没有开始过课程：请先运行 {first}.ipynb。"
    assert not (tmp_path / "run").exists()


def test_a_later_notebook_says_which_step_is_missing(finished_run, tmp_path):
    manifest = json.loads((finished_run.run_dir / "manifest.json").read_text(encoding="utf-8"))
    for name in ("adapter", "answers", "pack"):
        del manifest["files"][name]
    shutil.copytree(finished_run.path("tokenized"), tmp_path / "tokenized")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    done = run_course("04_infer", HUANHUAN_OUTPUT=str(tmp_path))
    assert done.returncode == 1
    assert (
        "请先运行 03_train_lora.ipynb" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("你好", "JSON"),
        ('[{"instruction": "a", "input": ""}]', "第 1 条的 output"),
        ("[]", "一条对话也没有"),
        ("", "空的"),
    ],
)
def test_a_bad_dataset_is_one_message_and_nothing_written(tmp_path, content, says):
    (tmp_path / "mine.json").write_text(content, encoding="utf-8")
    done = run_course(
        HUANHUAN_DATA=str(tmp_path / "mine.json"), HUANHUAN_OUTPUT=str(tmp_path / "run")
    )
    assert done.returncode == 1
    assert says in done.stderr and "mine.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def printed(run_dir, notebook: str) -> str:
    """What the cells of an executed copy have printed."""
    book = nbformat.read(run_dir / "executed" / f"{notebook}.ipynb", as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.newest
def test_04_answers_again_after_a_restart(finished_run):
    """A new kernel on the same run directory gives the same answers, and so does the pack."""
    before = finished_run.path("answers").read_text(encoding="utf-8")
    done = run_course("04_infer", "05_cleanup")
    assert done.returncode == 0, done.stderr
    assert finished_run.path("answers").read_text(encoding="utf-8") == before
    assert "和带走之前的回答一字不差。" in printed(finished_run.run_dir, "04_infer")
    page = (finished_run.run_dir / "executed" / "04_infer.html").read_text(encoding="utf-8")
    swept = json.loads((ROOT / "tests/benchmarks/results/sweep.json").read_text("utf-8"))["records"]
    assert all(f"{one['loss']:.3f}</td>" in page for one in swept)


def test_executed_copies_are_stamped_and_readable(finished_run):
    run_course("05_cleanup")
    page = html.unescape(
        (finished_run.run_dir / "executed" / "05_cleanup.html").read_text(encoding="utf-8")
    )
    assert finished_run.manifest["versions"]["transformers"] in page
    assert "删变量" in page
    assert page.count("<details><summary>参考答案") == page.count("celltag_solution celltag") == 3
    assert '<a href="01_setup.html"' in page


def small_run(run_dir, **settings):
    """A run that 01 and 02 have been through, on 48 rows."""
    rows = json.loads((ROOT / "data" / "huanhuan_sample.json").read_text(encoding="utf-8"))[:48]
    run_dir.parent.mkdir(exist_ok=True)
    (run_dir.parent / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    persona = json.loads((ROOT / "data" / "persona_huanhuan.json").read_text(encoding="utf-8"))
    persona |= {"dataset": "rows.json", "profile": settings}
    (run_dir.parent / "me.json").write_text(json.dumps(persona), encoding="utf-8")
    given = {"HUANHUAN_OUTPUT": str(run_dir), "HUANHUAN_PERSONA": str(run_dir.parent / "me.json")}
    done = run_course("01_setup", "02_preprocess", **given)
    assert done.returncode == 0, done.stderr
    return given


def running_03(given, until):
    """The runner on 03, once it has said `until`."""
    runner = subprocess.Popen(
        [sys.executable, "-u", "-m", "huanhuan", "03_train_lora"], cwd=NOTEBOOKS,
        env=os.environ | given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in runner.stdout:
        if until in line:
            return runner
    raise AssertionError(runner.stderr.read())


@pytest.mark.newest
def test_a_killed_kernel_and_ctrl_c_are_a_sentence_and_training_goes_on(tmp_path):
    given = small_run(tmp_path / "run", epochs=24, save_steps=2)
    for harm in ("kernel", "runner"):
        runner = running_03(given, "步，损失")  # heard when the next such line begins
        (kernel,) = psutil.Process(runner.pid).children()
        if harm == "kernel":
            kernel.kill()
        else:
            runner.send_signal(signal.SIGINT)
        said = runner.communicate(timeout=60)[1]
        assert runner.returncode == 1 and "接着" in said and "Traceback" not in said, said
        assert ("内核死了" if harm == "kernel" else "停下来了") in said
        psutil.wait_procs([kernel], timeout=30)
    done = run_course("03_train_lora", **given)
    assert done.returncode == 0, done.stderr
    said = printed(tmp_path / "run", "03_train_lora")
    assert "接着训练。" in said
    assert "与内存里训练好的逐一相同" in said and "给出的分数，最大差别：0\n" in said


def execute(*cells):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    client = NotebookClient(book, resources={"metadata": {"path": str(NOTEBOOKS)}})
    with pytest.raises(CellExecutionError):
        client.execute()
    (error,) = [o for o in book.cells[-1].outputs if o.output_type == "error"]
    return "\n".join(error.traceback)


def in_one_kernel(given: dict[str, str], *codes: str) -> list[str]:
    """What each cell printed, run one after another in one kernel; of one that failed, its message."""
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(book, resources=where, allow_errors=True).execute(env=os.environ | given)
    return [
        "".join(o.get("text", "") + "\n".join(o.get("traceback", [])) for o in cell.outputs)
        for cell in book.cells
    ]


@pytest.mark.newest
def test_cells_of_03_run_again_edited_and_interrupted(tmp_path):
    given = small_run(tmp_path / "run", epochs=1, save_steps=1)
    cells = {cell.id: cell.source for cell in SOURCES["03_train_lora"].cells}
    plain = [
        cell.id
        for cell in SOURCES["03_train_lora"].cells
        if cell.cell_type == "code" and "notebook-only" not in cell.metadata.get("tags", [])
    ]
    once = plain[: plain.index("train-save") + 1]
    read_back = "        again = model.eval()(input_ids=row).logits\n"
    edited = {
        "train-lora-config": ("r=profile.lora_r", "r=3"),
        "train-arguments": ("learning_rate=profile.learning_rate", "learning_rate=5e-3"),
    }
    for name, (ours, theirs) in edited.items():
        assert cells[name].count(ours) == 1
        edited[name] = cells[name].replace(ours, theirs)
    again = once[once.index("train-lora-config") :]
    kept = "print(course.record('adapter')['used'])"
    codes = [
        *(cells[name] for name in once), kept,
        cells["train-proof-logits"].replace(read_back, "        raise KeyboardInterrupt\n"),
        cells["train-train"], cells["train-save"], cells["train-proof-logits"],
        *(edited.get(name, cells[name]) for name in again), kept,
        *(cells[name] for name in again), kept,
    ]  # fmt: skip
    said = dict(enumerate(in_one_kernel(given, *codes)))
    first, place = said[once.index("train-train")], len(once)
    assert "'lora_r': 8" in said[place]
    assert said[place + 1].startswith("⛔ 停下了") and "\n" not in said[place + 1].strip()
    loss = first[first.index("验证集损失") :]
    assert said[place + 2].endswith(loss), said[place + 2]  # afresh, not from what was read back
    assert "最大差别：0\n" in said[place + 4]
    place += 5 + len(again)
    assert "'lora_r': 3" in said[place] and "'learning_rate': 0.005" in said[place]
    assert not said[place - 3].endswith(loss)
    place += 1 + len(again)
    assert "'lora_r': 8" in said[place] and not [n for n in said if "Traceback" in said[n]]


def test_a_name_that_is_not_there_is_one_sentence_that_names_the_cell():
    said = execute("import huanhuan\nmodel = 1", "del model", "model + 1")
    assert len(said.splitlines()) == 1 and "model" in said and "`import huanhuan`" in said
    assert "Run All Above" in execute("import huanhuan", "course.path('data')")


def test_a_long_cell_is_said_to_run(monkeypatch, tmp_path, capsys):
    from huanhuan import __main__ as runner

    monkeypatch.setattr(runner, "SILENCE", 1)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; time.sleep(4)")])
    nbformat.write(book, tmp_path / "slow.ipynb")
    runner.run(tmp_path / "slow.ipynb", tmp_path / "none" / "executed")
    assert capsys.readouterr().out.count("… 第 1 格，运行了") >= 2


def test_the_runner_works_from_the_projects_folder_and_prints_in_any_encoding(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "huanhuan", "02_preprocess"], cwd=ROOT, capture_output=True,
        env=os.environ | {"HUANHUAN_OUTPUT": str(tmp_path / "run"), "PYTHONIOENCODING": "gbk"},
    )  # fmt: skip
    said = done.stderr.decode("gbk")
    assert done.returncode == 1 and "请先运行 01_setup.ipynb" in said and "Traceback" not in said


@pytest.mark.parametrize("name", SOURCES)
def test_a_kernel_started_elsewhere_is_one_sentence(tmp_path, name):
    (cell,) = [c.source for c in SOURCES[name].cells if "os.chdir(r'" in c.source]
    done = subprocess.run(
        [sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("这里没有课程"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_copy_of_a_notebook_is_not_run(tmp_path):
    from huanhuan.__main__ import BOOKS as KNOWN

    assert [path.stem for path in BOOKS] == KNOWN
    done = run_course("03_train_lora-Copy1", HUANHUAN_OUTPUT=str(tmp_path))
    assert done.returncode == 1 and "没有这本笔记本" in done.stderr


@pytest.mark.gpu
def test_the_real_model_on_a_gpu(tmp_path):
    """All five notebooks with the GPU's profile; HUANHUAN_MODEL may name a local folder."""
    import torch

    assert torch.cuda.is_available(), "this test needs an NVIDIA GPU"
    environment = {"HUANHUAN_OUTPUT": str(tmp_path / "run"), "HUANHUAN_PROFILE": ""}
    done = run_course(**environment)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["profile"]["device"] == "cuda"
    made = json.loads((tmp_path / "run" / "llama3_lora" / "made.json").read_text("utf-8"))
    assert made["results"]["eval_loss_after"] < made["results"]["eval_loss_before"]
