# `make setup` once; the other targets call it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo check test test-full docs clean

setup: $(STAMP)

# The lock names every package exactly; the project itself is linked, not copied.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

# Two at a time: what XLA compiles, and what waits for signals, leaves a core idle.
test: setup
	$(BIN)/pytest -m "not full" -n 2

# Everything, the slow proofs too (ten times the fuzz, kills at every call): about 30 minutes on
# 2 cores, 8 GB of memory, 4 GB of disk; kills need strace, a full disk needs root.
test-full: setup
	$(BIN)/pytest

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
