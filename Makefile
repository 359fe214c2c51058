# `make demo` and `make test` work on a fresh machine with Python >= 3.11, gcc and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help install demo test test-all check clean

help:            ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(READY) ## create .venv and install expertpager with its pinned dependencies

$(READY): pyproject.toml constraints.txt setup.py $(wildcard offload/kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)   ## convert a small checkpoint, then generate with a quarter of its experts in RAM
	$(BIN)/expertpager demo

test: $(READY)   ## run the tests
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not cuda"

test-all: $(READY) ## run all tests, also those that take minutes; property tests with new examples each time
	$(BIN)/python -m pytest -q -n 2 -m "not cuda" --hypothesis-profile default

check: $(READY)  ## types, sanitizers and everything `make test` leaves out
	$(BIN)/mypy
	$(BIN)/python tests/kernels/sanitize.py

clean:           ## remove what was built and installed
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f offload/kernels/_native*.so
