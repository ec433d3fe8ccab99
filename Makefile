# `make run` and `make test` set up everything they need: Python 3.11, a C++ compiler and the package index suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch first and pinned: a plain `torch` takes several GB of CUDA packages on a machine without a GPU
TORCH := $(shell grep -E '^torch==' constraints.txt)

.PHONY: run test test-slow lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

run: $(STAMP)
	$(BIN)/mates run launchers/recipes/quickstart.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p mates
	$(BIN)/mypy tests benchmarks

test: lint
	$(BIN)/python -P -m pytest

test-slow: $(STAMP)
	$(BIN)/python -P -m pytest -m slow

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
