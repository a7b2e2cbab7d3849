# `make setup` once; the other targets call it.
# The first of these that the lock serves; or `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
    && echo $$python && break; done)
# Where PyTorch comes from. Its own index has a build for the processor alone, of 0.2 GB; that of
# PyPI (TORCH_INDEX=https://pypi.org/simple) brings CUDA, 3 GB more.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := pip install --quiet --disable-pip-version-check

.PHONY: setup demo check lint test test-fast test-full test-gpu gpu-kit test-cs mutation coverage docs lock pictures site dist bench clean

setup: $(STAMP)

# The lock names every package exactly; the project itself is linked, not copied.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(or $(PYTHON),$(error found no Python 3.11, 3.12 or 3.13; install \
	    one, or name it: make setup PYTHON=/path/to/python3.12)) -m venv $(VENV)
	@$(BIN)/$(INSTALL) --no-deps --retries 1 --index-url $(TORCH_INDEX) \
	    "$$(grep '^torch==' requirements.lock)" \
	    || { echo "PyTorch was not found at $(TORCH_INDEX); name another index, such as PyPI's \
	(with CUDA, 3 GB): make setup TORCH_INDEX=https://pypi.org/simple" >&2; exit 1; }
	$(BIN)/$(INSTALL) --requirement requirements.lock
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@echo "ready; for the command gptj in this shell: source $(BIN)/activate"

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh

check: lint
	$(BIN)/pyright
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/site

# The fast part, which pre-commit calls.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

# Two at a time: what XLA compiles, and what waits for signals, leaves a core idle.
test: setup
	$(BIN)/pytest -m "not full" -n 2 --dist worksteal

# The inner loop: what needs no process of its own, no training and no other library's model.
test-fast: setup
	$(BIN)/pytest -m "not full" -n 2 --dist worksteal tests/unit tests/contract tests/fuzz

# Everything, the slow proofs too (twenty times the fuzz, kills at every call, the commands of the
# docs): 25 minutes on 2 cores, 8 GB of memory, 4 GB of disk; kills need strace, a full disk
# needs root.
test-full: setup
	$(BIN)/pytest -n 2 --dist worksteal

# On an NVIDIA GPU, in a virtual environment of its own with TensorFlow's build for it: the lock
# but for that one name, and NVIDIA's libraries, about 10 GB.
GPU_VENV := .venv-gpu
test-gpu:
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	sed 's/^tensorflow-cpu==/tensorflow[and-cuda]==/' requirements.lock > $(GPU_VENV)/gpu.lock
	$(GPU_VENV)/bin/$(INSTALL) --requirement $(GPU_VENV)/gpu.lock
	$(GPU_VENV)/bin/$(INSTALL) --no-deps --no-build-isolation --editable .
	$(GPU_VENV)/bin/pytest -m gpu -rs

# What a GPU machine without a network needs to prove and measure all of it (docs/benchmarks.md, On a
# GPU): build/gpu-kit, at most 60 MiB; there, `bash build/gpu-kit/gpu/run.sh`.
gpu-kit: setup
	$(BIN)/python gpu/kit.py build/gpu-kit

# The CS client itself, in a virtual environment of its own: it pins an old torch, about 6 GB.
CS_VENV := .venv-cs
test-cs: setup
	@test -x $(CS_VENV)/bin/python || $(PYTHON) -m venv $(CS_VENV)
	$(CS_VENV)/bin/$(INSTALL) cerebras-pytorch==2.10.0
	GPTJ_CS_PYTHON=$(CURDIR)/$(CS_VENV)/bin/python $(BIN)/pytest tests/contract/test_cs_client.py

# Do the unit tests notice a changed line? 15 to 30 minutes on one core, 3 GB of memory; one part
# again: make mutation MODULES="runner/training/update/schedules.py". docs/testing.md has the results.
mutation: setup
	$(BIN)/python tests/mutation.py $(MODULES)

# What `make test` passes through, in this process alone: build/coverage/index.html.
coverage: setup
	$(BIN)/pytest -m "not full" -n 2 --dist worksteal --cov --cov-report=term --cov-report=html

docs: setup
	$(BIN)/python docs/generate.py

# The newest versions that fit pyproject.toml, for every Python that is supported; the versions of
# the lock where they need not change with OPTIONS=--keep.
PYTHONS ?= python3.11 python3.12 python3.13
lock:
	$(PYTHON) release/lock.py $(OPTIONS) $(PYTHONS)

# The pages of the demo as the documentation shows them; needs chromium.
CHROMIUM ?= chromium
pictures: demo
	cd demo-output && ../$(BIN)/gptj verify --against gpt-j-tiny --report report.html --quiet
	for page in report runs; do \
	    $(CHROMIUM) --headless --no-sandbox --hide-scrollbars --window-size=1000,900 \
	        --screenshot=docs/images/$$page.png "file://$(CURDIR)/demo-output/$$page.html"; done

# The documentation as pages: build/site/index.html.
site: docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/site

# What a release publishes: a wheel and a source archive.
dist: setup
	$(BIN)/python -m build --no-isolation --outdir dist

# Every claim of speed and memory, beside its peer: about half an hour on an idle machine.
bench: setup
	$(BIN)/python benchmarks/claims.py build/bench

clean:
	rm -rf $(VENV) $(CS_VENV) $(GPU_VENV) demo-output build dist mutants .coverage *.egg-info
