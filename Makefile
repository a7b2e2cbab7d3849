# `make setup` once; the other targets call it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := pip install --quiet --disable-pip-version-check

.PHONY: setup demo check test test-full test-gpu gpu-kit test-cs mutation coverage docs pictures site bench clean

setup: $(STAMP)

# The lock names every package exactly; the project itself is linked, not copied.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --requirement requirements.lock
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@echo "ready; for the command gptj in this shell: source $(BIN)/activate"

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/site

# Two at a time: what XLA compiles, and what waits for signals, leaves a core idle.
test: setup
	$(BIN)/pytest -m "not full" -n 2 --dist worksteal

# Everything, the slow proofs too (ten times the fuzz, kills at every call, the commands of the
# docs): about an hour on 2 cores, 8 GB of memory, 4 GB of disk; kills need strace, a full disk
# needs root.
test-full: setup
	$(BIN)/pytest

# On an NVIDIA GPU, in a virtual environment of its own with TensorFlow's build for it: the lock
# but for that one name, and NVIDIA's libraries, about 10 GB.
GPU_VENV := .venv-gpu
test-gpu:
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	sed 's/^tensorflow_cpu==/tensorflow[and-cuda]==/' requirements.lock > $(GPU_VENV)/gpu.lock
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

# Every claim of speed and memory, beside its peer: about half an hour on an idle machine.
bench: setup
	$(BIN)/python benchmarks/claims.py build/bench

clean:
	rm -rf $(VENV) $(CS_VENV) $(GPU_VENV) demo-output build dist mutants .coverage *.egg-info
