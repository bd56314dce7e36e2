# Every target works on a fresh machine: what it needs, it installs (PyPI into .venv, programs with apt).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo check protos check-protos test test-fast bench clean programs-demo programs-test

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml tools/setup.py
	@$(PYTHON) tools/setup.py python $(VENV)
	@touch $@

setup: $(STAMP) ## make .venv and install the project and its tools into it

programs-demo:
	@$(PYTHON) tools/setup.py programs demo

programs-test:
	@$(PYTHON) tools/setup.py programs test

demo: $(STAMP) programs-demo ## pull an image from a registry of its own and run it, in folders of its own
	@$(BIN)/python tools/demo.py

check: $(STAMP) ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: $(STAMP) ## generate supervisord_ctr/api from protos/
	$(BIN)/python tools/protos.py

check-protos: $(STAMP) ## show that the generated code is current and the wire interfaces are the published ones
	$(BIN)/python tools/protos.py --check

test-fast: $(STAMP) ## unit and contract tests
	$(PYTEST) tests/unit tests/contract

test: $(STAMP) programs-test check check-protos ## everything: checks, then all tests
	$(PYTEST) tests

bench: $(STAMP) programs-test ## measure beside containerd; BENCH_JSON=FILE keeps the numbers, CONTAINERD=PATH names another one
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
