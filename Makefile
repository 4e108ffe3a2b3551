# One environment for everything: made by the first target that needs it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check format clean

demo: .venv/demo          ## install the package and run the main job on embedded data
	$(BIN)/topkd run digits

test: .venv/dev           ## all quick tests and the examples in the documentation
	$(BIN)/pytest

slow: .venv/dev           ## every test
	$(BIN)/pytest -m ""

check: .venv/dev          ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev         ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:                    ## remove the environment and what tools leave behind
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'topkd needs Python 3.10 or newer')"
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
