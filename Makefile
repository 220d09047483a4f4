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

# In random order; to have an order again: make test SEED=... Tests that call native runtimes run in processes of their own:
# one whole run in two processes ended with a SIGSEGV of a thread that blocks signals, whose library is not known yet.
SEED ?= $(shell date +%s)
PYTEST = $(BIN)/python -m pytest -n 2 --randomly-seed $(SEED) --durations 10
one_each = $(foreach name,$(1),tests/test_$(name).py)
RUNTIMES := $(call one_each,agreement api cli criteria engines export latency memory peers profile quantize released \
	repository rounding selection)
SERVERS := $(call one_each,serving suite)

test: lint $(TRITON_READY)
	@echo 'order of tests: SEED=$(SEED)'
	$(PYTEST) --dist worksteal $(addprefix --ignore=,$(RUNTIMES) $(SERVERS))
	$(PYTEST) --dist worksteal $(RUNTIMES)
	# A file a process: one server for all its tests.
	LOWPASS_TRITON=$(abspath $(TRITON_VENV)) $(PYTEST) --dist loadfile $(SERVERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorrt-rtx,openvino]'
	touch $@

triton: $(READY) $(TRITON_READY)

$(TRITON_READY): constraints-triton.txt
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-triton.txt
	touch $@
