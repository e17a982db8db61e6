# Two commands matter: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-slow test-slurm test-faults lint format clean

help:
	@echo "make demo    set up, then run the whole journey on the bundled teacher (CPU, minutes)"
	@echo "make test    set up, then run the tests"
	@echo "make test-slow   tests of several minutes: the golden results of every recipe and layout"
	@echo "make test-slurm   the launch scripts on a real Slurm cluster inside this machine (root, Debian packages)"
	@echo "make test-faults  kill, truncate, fill the disk: nothing may be lost"
	@echo "make lint    set up, then ruff, mypy, shellcheck and hadolint"
	@echo "make setup   create $(VENV) from constraints.txt"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "megaqad needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/megaqad demo

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --ignore=tests/slurm --ignore=tests/faults

test-slow: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow --hypothesis-seed=0 --ignore=tests/slurm --ignore=tests/faults

test-slurm: setup
	tests/slurm/run.sh

test-faults: setup
	$(BIN)/python -m pytest -q tests/faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch tests/slurm/*.sh .ci/run
	$(BIN)/hadolint docker/*.Dockerfile

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
