# Needs only make and Python 3.11 or newer. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Holds for build isolation too, so that torch is the tested version everywhere.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint unit bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.base ## install into .venv and run the first scenario
	$(BIN)/eplbctl run scenarios/quickstart.yaml

test: lint unit ## install with the test tools, then lint, types, import rules and all tests

lint: $(VENV)/.dev ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev ## the tests alone; narrow them with ARGS="tests/core -x"
	$(BIN)/pytest $(ARGS)

bench: $(VENV)/.dev ## the benchmarks, which are no part of the tests
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/protocol_and_step_cpu.json $(ARGS)

clean: ## remove .venv and every cache
	rm -rf $(VENV) .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[hf,metrics]' -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[hf,metrics,test,dev]' -c constraints.txt
	@touch $@ $(VENV)/.base
