# make demo   the whole program on real footage, with no network beyond the package index, no key, no GPU
# make test   the tests; make test-integration whole runs of jobs and S3 servers, make test-slow all of both and the long ones
# make lint   ruff and mypy
# make docs   docs/configuration.md, from the dataclasses
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-integration test-slow lint format docs environment clean

demo: $(READY)
	$(BIN)/mediafm demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not integration" --ignore tests/end_to_end --numprocesses 3 --dist loadfile
	$(BIN)/python -m pytest -m "not slow and not integration" tests/end_to_end --numprocesses 2 --dist loadfile

test-integration: $(READY)
	$(BIN)/python -m pytest -m "integration and not slow" --numprocesses 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m docs.configuration

environment: $(READY)

# torch first and pinned: with torch there, nothing asks the index for another build of it
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"
	touch $(READY)

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache
