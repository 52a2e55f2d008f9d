# Everything runs in a virtual environment of the checkout; the first command makes it, later ones reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A CPU build of torch, pinned here only: a bare `torch` drags in gigabytes of CUDA packages. It stands beside whatever
# is installed, so that no library can bring another.
TORCH ?= torch==2.13.0

# Python compiles what is imported when it is; compiling all that is installed takes longer than installing it.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help demo test lint types layers doctest site unit docs package format clean
.DELETE_ON_ERROR:

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml Makefile
	@echo "== setting up $(VENV) with $(TORCH) (about two minutes on a fresh machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)" --editable ".[dev,bench,docs]"
	@touch $@

demo: $(READY)  ## train a small language model, save it with and without the callback, compare
	@echo "== demo: examples/train_char_lm.py"
	@$(BIN)/python examples/train_char_lm.py

test: lint types layers doctest site unit  ## the whole check, as CI runs it
	@echo "== all checks passed"

lint: $(READY)  ## ruff
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict on the package
	@echo "== mypy --strict"
	@$(BIN)/mypy

layers: $(READY)  ## the import-layer contract
	@echo "== import layers"
	@$(BIN)/lint-imports --no-cache

doctest: $(READY)  ## the examples in docstrings
	@echo "== doctests"
	@$(BIN)/python -m pytest --doctest-modules q8lightning

site: $(READY)  ## the documentation in build/site; a warning is an error
	@echo "== site"
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --write-all --quiet -b html docs build/site

unit: $(READY)  ## the tests on all cores, with the kernels interpreted on the CPU
	@echo "== tests (kernels interpreted)"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --durations=10

docs: $(READY)  ## renew what the commands print in docs/cli.md
	@$(BIN)/python docs/capture.py

package: $(READY)  ## the wheel and the source distribution in dist/, checked, and tried in a clean environment
	@echo "== package"
	@rm -rf dist build/lib
	@$(PIP) build twine
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python .ci/check_package.py dist "$(TORCH)"

format: $(READY)  ## rewrite the code in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment and everything made by running
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
