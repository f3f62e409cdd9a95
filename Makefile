# make demo   a fresh machine: installs, and runs the main job on the bundled model
# make test   a fresh machine: installs, and passes the tests
# make test-all   the same, and then the tests that take long: processes that are killed, whole runs, load
#                EXTRAS=[rtx] installs an extra too
# make check  what every commit passes: format, lint, types, tests

PYTHON ?= python3
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all check format clean

demo: $(STAMP)
	$(BIN)/clusterq run digits --out runs/demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch and torchvision are resolved together: a torchvision beside another build of torch does not load
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".$(EXTRAS)" --group dev
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
