# Two commands: `make demo` and `make test`. Each makes the environment first when it is missing.
# A warm environment can be reused: make test VENV=/path/to/venv
VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
BIN := $(VENV)/bin
READY := $(VENV)/.lowpass-ready
# The Triton server's own environment: its wheel needs another NumPy.
TRITON_VENV ?= .venv-triton
TRITON_READY := $(TRITON_VENV)/.lowpass-ready

.PHONY: demo test lint triton

demo: $(READY)
	$(BIN)/lowpass demo --out $(OUT)

test: lint $(TRITON_READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/test_suite.py --ignore tests/test_serving.py
	# Apart, a file a process: at the end of all other tests in one process, native code of the runtimes has crashed in
	# the first, and the second has one server for all its tests.
	LOWPASS_TRITON=$(abspath $(TRITON_VENV)) $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_suite.py tests/test_serving.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorrt-rtx,openvino]'
	touch $@

triton: $(TRITON_READY)

$(TRITON_READY): constraints-triton.txt
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-triton.txt
	touch $@
