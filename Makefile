# Each target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer); ARGS goes to the command.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests move from a busy worker to an idle one, so that both work until the end.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal
CODE   := setup.py maxlm kernels_pallas configs benchmarks

.PHONY: help train life rlhf test test-slow test-all test-nightly faults compilers lint types
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(STAMP) ## train the tiny model on this machine, one to two minutes (ARGS="--train.steps=50" overrides)
	$(BIN)/python -m maxlm.train --config configs/tiny.py $(ARGS)

life: $(STAMP) ## a model's whole life in small: text, conversations, preferences, rewards, 8 bits; about nine minutes
	launch/life.sh

rlhf: $(STAMP) ## the classic chain in small: SFT, a reward model, PPO-ptx, and how often it wins against SFT
	launch/life.sh rlhf

test: $(STAMP) ## the tests, without the slow ones
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

test-slow: $(STAMP) ## the slow tests alone
	$(PYTEST) -m "slow and not nightly" $(ARGS)

test-all: $(STAMP) ## both in one go
	$(PYTEST) -m "not nightly" $(ARGS)

test-nightly: $(VENV)/compilers/.installed $(VENV)/.nightly ## compile what takes minutes each: every preset for its machine, large meshes; an hour or so
	$(BIN)/python -m pytest -q -m nightly $(ARGS)

compilers: $(VENV)/compilers/.installed ## compilers for TPU and GPU (1.4 GB), so that the tests compile for them; no chip is needed

faults: $(STAMP) ## do what may go wrong to real commands, and print a table, in about 40 minutes (ARGS="ranks" chooses)
	JAX_PLATFORMS=cpu PYTHONPATH=tests $(BIN)/python -m faults.run $(ARGS)

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

# Engines past one machine, by which a test cleans text, and what drives a browser: Chromium itself is the machine's.
$(VENV)/.nightly: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[cluster,browser]'
	@touch $@

# In a folder of their own, where only tests/aot.py looks: jax would try every compiler of its environment in every run.
$(VENV)/compilers/.installed: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python tests/aot.py > $(VENV)/compilers.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(@D) -r $(VENV)/compilers.txt
	@touch $@
