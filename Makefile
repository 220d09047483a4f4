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

# Tests that trace models or call native runtimes. They run apart, and after the others: late in a process that had done
# both, tests of plain PyTorch have met damaged memory (a NaN loss, an impossible label).
one_each = $(foreach name,$(1),tests/test_$(name).py)
RUNTIMES := $(call one_each,agreement cli criteria engines export latency peers profile quantize released rounding selection)
SERVERS := $(call one_each,serving suite)

.PHONY: demo test lint triton

demo: $(READY)
	$(BIN)/lowpass demo --out $(OUT)

test: lint $(TRITON_READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(addprefix --ignore=,$(RUNTIMES) $(SERVERS))
	$(BIN)/python -m pytest -n 2 --dist worksteal $(RUNTIMES)
	# A file a process: one server for all its tests.
	LOWPASS_TRITON=$(abspath $(TRITON_VENV)) $(BIN)/python -m pytest -n 2 --dist loadfile $(SERVERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorrt-rtx,openvino]'
	touch $@

triton: $(READY) $(TRITON_READY)

$(TRITON_READY): constraints-triton.txt
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-triton.txt
	touch $@
