# `make quickstart` trains the smallest example, `make test` checks everything. Both make .venv when it is missing, and install
# again only when pyproject.toml changes. PYTHON is the interpreter that .venv is made with (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAKE := .venv-lake

.PHONY: quickstart test test-lake format clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m launch.train --gin_file=configs/quickstart.gin --workdir=checkpoints/quickstart

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2 --dist loadfile

# The lake has an environment of its own: it needs an older pyarrow than the rest is tested with.
test-lake: $(LAKE)/.installed
	$(LAKE)/bin/pytest -n 2 --dist loadfile tests/lake

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LAKE) build *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

$(LAKE)/.installed: pyproject.toml
	test -x $(LAKE)/bin/python || $(PYTHON) -m venv $(LAKE)
	$(LAKE)/bin/python -m pip install --quiet --editable '.[dev-lake]'
	touch $@
