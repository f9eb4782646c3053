# Two commands for newcomers: `make serve` and `make test`. Both make .venv when it is missing.
#
# The CPU build of torch is enough for everything here. Where pip would choose a CUDA build, name an
# index of CPU wheels: make serve PIP_ARGS="--extra-index-url URL".
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
MODEL ?= embedded
ARGS ?=

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
INSTALLED = $(VENV)/.installed
DEV = $(VENV)/.installed-dev

.PHONY: serve test check format clean help

help:
	@echo "make serve    serve the embedded model at http://127.0.0.1:8000 (MODEL=..., ARGS=...)"
	@echo "make test     run the tests (ARGS=... goes to pytest)"
	@echo "make check    format, lint, types, import layers, house rules"
	@echo "make format   put the code into the house's format"
	@echo "make clean    remove .venv and what tools left"

serve: $(INSTALLED)
	@exec $(VENV)/bin/halyard serve $(MODEL) $(ARGS)

# Torch's threads must not spin at barriers: with a test on every core each would wait for a time slice.
test: $(DEV)
	GOMP_SPINCOUNT=0 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(DEV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PYTHONPATH=pkg $(VENV)/bin/lint-imports
	$(VENV)/bin/python ci/house.py

format: $(DEV)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Halyard needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are written last, so that an interrupted install is done again.
$(INSTALLED): $(VENV)/bin/python pyproject.toml
	@echo "Installing into $(VENV); the first time takes a few minutes"
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	@$(PIP) -e .
	@touch $@

$(DEV): $(INSTALLED)
	@echo "Installing what the tests need into $(VENV)"
	@$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
