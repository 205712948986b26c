# `make demo` and `make test` set up everything that they need, then do their work. The environment is .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: setup demo test lint types bench lerobot vm-test clean help

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo       the virtual cell: a trained policy picks a cube up and drops it in a tray
demo: $(VENV)/.demo
	$(BIN)/understudy demo

## make test       every test (what runs in CI)
test: $(VENV)/.test
	$(BIN)/python -m pytest

## make setup      the environment with everything, without running anything
setup: $(VENV)/.test

## make lint       format, lint, types, oldest Python
lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --target=3.10- --violations device firmware_bridge provisioning

## make bench      the benchmark tables of docs/benchmarks.md
bench: $(VENV)/.test
	$(BIN)/python -m tests.bench

## make lerobot    the real LeRobot in an environment of its own (3 GB), for the tests that compare with it
lerobot:
	sh tests/lerobot_env.sh

## make vm-test    cameras and servo bus under real drivers, in a virtual machine (root)
vm-test: $(VENV)/.test
	$(BIN)/python -m tests.vm.run

$(VENV)/bin/python:
	sh provisioning/native.sh
	$(PYTHON) -m venv $(VENV)

# torch's wheel index differs from machine to machine; the exact version is pinned in constraints.txt.
$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test]'
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache report
