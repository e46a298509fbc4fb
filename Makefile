# `make run` and `make test` each set up by themselves on a fresh machine (Python 3.11+).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
STAMP := $(VENV)/.installed

.PHONY: run test lowest lint docs clean

run: $(STAMP)
	$(BIN)/pfedgpa run $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 4 --dist loadgroup $(ARGS)

# the lowest versions that pyproject.toml allows: several GB and minutes more
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 4 --dist loadgroup $(ARGS)

$(LOWEST)/.installed: pyproject.toml scripts/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) scripts/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[test]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP): pyproject.toml scripts/activate-flower.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	cat scripts/activate-flower.sh >> $(BIN)/activate
	touch $(STAMP)

# the documentation's site, in docs/_build/html
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build/html

clean:
	rm -rf $(VENV) $(LOWEST) .flwr-home docs/_build docs/generated
