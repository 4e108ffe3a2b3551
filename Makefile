# One environment for everything: made by the first target that needs it.
PYTHON ?= python3
BIN := .venv/bin
# One process per core. If one dies the suite ends: a replacement would wait forever for work.
WORKERS := -n auto --dist loadfile --max-worker-restart 0

.PHONY: demo test slow minimum check types format clean

demo: .venv/demo          ## install the package and run the main job on embedded data
	$(BIN)/topkd run digits

test: .venv/dev           ## all quick tests and the examples in the documentation
	$(BIN)/pytest $(WORKERS)

slow: .venv/examples      ## every test
	$(BIN)/pytest $(WORKERS) -m ""

minimum: .venv-minimum/dev ## quick tests with the oldest version of each dependency
	.venv-minimum/bin/python docs/versions.py $(WORKERS)

check: .venv/dev          ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: .venv/dev          ## types under every Python that is supported
	for version in 3.10 3.11 3.12 3.13 3.14; do \
		$(BIN)/mypy --python-version $$version || exit 1; done

format: .venv/dev         ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:                    ## remove the environment and what tools leave behind
	rm -rf .venv .venv-minimum .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'topkd needs Python 3.10 or newer')"
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/examples: .venv/dev
	$(BIN)/python -m pip install --quiet lightning transformers
	touch $@

.venv-minimum/dev: pyproject.toml
	$(PYTHON) -m venv --clear .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=.venv-minimum .venv-minimum/bin/uv pip install --quiet --resolution lowest-direct \
		--all-extras --requirements pyproject.toml --editable .
	touch $@
