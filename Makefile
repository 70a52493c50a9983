# Each target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer); ARGS goes to the command.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CODE   := setup.py maxlm kernels_pallas configs benchmarks

.PHONY: help train test test-slow lint types
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(STAMP) ## train the tiny model on this machine, about two minutes (ARGS="--train.steps=50" overrides)
	$(BIN)/python -m maxlm.train --config configs/tiny.py $(ARGS)

test: $(STAMP) ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(ARGS)

test-slow: $(STAMP) ## the slow tests alone
	$(BIN)/python -m pytest -q -n 2 -m slow $(ARGS)

lint: $(STAMP) ## style: ruff's rules and its formatter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy $(CODE)

# Once, and again when setup.py changes. Only a finished installation leaves the stamp.
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maxlm needs Python 3.11 or newer; make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)
