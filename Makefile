# `make run` and `make test` set up everything they need: Python 3.11, a C++ compiler and the package index suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch first and pinned: a plain `torch` takes several GB of CUDA packages on a machine without a GPU
TORCH := $(shell grep -E '^torch==' constraints.txt)
# what the tests on a SLURM cluster need, as root
DEBIAN := slurm-wlm munge pdsh openssh-server libpmix2 iproute2

.PHONY: run test test-slow test-slurm lint install clean

# torch's builds for GPUs ask for a triton of their own
PINS := $(if $(shell command -v nvidia-smi),$(VENV)/constraints.txt,constraints.txt)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(PINS) -e ".[dev]"
	touch $@

run: $(STAMP)
	$(BIN)/mates run launchers/recipes/quickstart.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p mates
	$(BIN)/mypy tests benchmarks

# two files at a time, each on a core of its own
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -P -m pytest -m slow

test-slurm: $(STAMP)
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(DEBIAN) >/dev/null 2>&1; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $(DEBIAN); \
	fi
	$(BIN)/python -P -m pytest -m slurm tests/slurm

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
