# `make quick` runs the quick study end to end; `make test` lints and tests. Both make .venv first if need be.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quick test torture lint bench clean

quick: .venv/installed
	$(BIN)/cyclebench run quick

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal

# The tests whose size is small by default, at their full one: kills, shared stores, broken input.
torture: .venv/installed
	CYCLEBENCH_KILLS=200 CYCLEBENCH_LEASE_CELLS=200 CYCLEBENCH_LEASE_WORKERS=8 CYCLEBENCH_FUZZ=2000 HF_HUB_OFFLINE=1 \
	    $(BIN)/pytest -q tests/test_kill.py tests/test_lease.py tests/test_bad_input.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/cyclebench bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
