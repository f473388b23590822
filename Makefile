PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run install test slow check clean

run: $(VENV)/.installed
	$(BIN)/fedllm quickstart

install: $(VENV)/.developer

# The constraints file says which versions were tested together; torch is pinned so that no resolver moves it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,federation,homomorphic,pretrain,privacy,prompts,serve]'
	touch $@

test: install
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fedllm
	$(BIN)/mypy --strict -p fedllm.core

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
