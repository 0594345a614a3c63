# Everything that is made here lies in this folder (.venv, demo, caches); nothing outside it is touched.
#
#   make PYTHON=python3.12 …   another interpreter
#   make VENV=/some/where …    another place for the virtual environment
#   make test TEST_ARGS='-m slow tests/imaging'
#   make bench ARGS=--write …  put the tables into docs/performance.md

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
TEST_ARGS ?= -n logical --maxprocesses=4 --dist=loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

.PHONY: help demo test bench lint format docs install dev clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: $(RUN) ## simulate a small night, find its transients, write demo/report.html
	$(BIN)/batchproc demo --out $(OUT)

test: $(DEV) ## run the tests (the usual ones; see CONTRIBUTING.md for the others)
	$(BIN)/python -m pytest $(TEST_ARGS)

bench: $(BENCH) ## measure speed and memory beside other programs (minutes)
	$(BIN)/python -m tests.benchmarks.performance $(ARGS)

lint: $(DEV) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV) ## write the pages of docs/ that are generated from the code
	$(BIN)/python docs/generate.py

install: $(RUN) ## only install batchproc into .venv
dev: $(DEV) ## only install batchproc and the developers' tools into .venv

clean: ## remove what make has made (.venv, demo, caches)
	rm -rf .venv demo build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are older than pyproject.toml when its dependencies may have changed: then pip looks again.
$(RUN): $(BIN)/python pyproject.toml
	@echo "Installing batchproc into $(VENV); the first time takes a minute or two."
	$(PIP) install --editable .
	@touch $@

$(DEV): $(BIN)/python pyproject.toml
	@echo "Installing batchproc and the developers' tools into $(VENV); the first time takes a minute or two."
	$(PIP) install --editable '.[dev]'
	@touch $@ $(RUN)

$(BENCH): $(BIN)/python pyproject.toml
	@echo "Installing batchproc and what it is compared with into $(VENV); the first time takes a few minutes."
	$(PIP) install --editable '.[bench]'
	@touch $@ $(RUN)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "batchproc needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
