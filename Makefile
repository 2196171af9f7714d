# make course：装好环境，跑完五本笔记本    make lab：打开 JupyterLab    make test：运行全部测试
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: course lab test test-gpu

course: $(VENV)/installed
	cd notebooks && ../$(BIN)/python -m huanhuan

lab: $(VENV)/installed
	cd notebooks && ../$(BIN)/jupyter lab 01_setup.ipynb

test: $(VENV)/installed-tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pytest

test-gpu: $(VENV)/installed-tests
	$(BIN)/pytest -m gpu -s tests

$(VENV)/installed: requirements.txt constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(BIN)/pip install -q -r tests/requirements.txt -c constraints.txt
	touch $@
