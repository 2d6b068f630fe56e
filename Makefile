# Each target sets up .venv by itself when it is missing; `make PYTHON=python3.13 …`
# chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/digits
# The versions that are tested; `make CONSTRAINTS= …` takes the newest that fit.
CONSTRAINTS ?= --constraint constraints.txt

.PHONY: help quickstart test test-slow test-install lint format clean

help:
	@echo "make quickstart  train, evaluate and predict handwritten digits (about 3 minutes)"
	@echo "make test        the test suite"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-install  install into a fresh environment, run from another folder"
	@echo "make lint        ruff and mypy"

# Installed again whenever pyproject.toml changes.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/installed
	$(BIN)/python -m mlp_mixer.train --config=configs/digits.py
	$(BIN)/python -m mlp_mixer.evaluate --workdir=$(RUN)
	$(BIN)/python -m mlp_mixer.predict --workdir=$(RUN) docs/digits
	@echo "Look at $(RUN)/report.png."

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m slow

# The wheel as a user gets it: no clone in sight, recipes included.
test-install: $(VENV)/installed
	rm -rf build/install && mkdir -p build/install/elsewhere
	$(BIN)/python -m venv build/install/venv
	build/install/venv/bin/python -m pip install --quiet $(CONSTRAINTS) .
	cd build/install/elsewhere && ../venv/bin/python -m mlp_mixer.train \
	  --config=configs/digits.py --config.total_steps=60 --data_dir=data
	cd build/install/elsewhere && ../venv/bin/python -m mlp_mixer.evaluate \
	  --workdir=runs/digits --data_dir=data
	rm -rf build/install

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache
