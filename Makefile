# `make quick` runs the quick study end to end; `make test` lints and tests. Both make .venv first if need be.
# QUICK: more for the command, as .ci/run has it.
PYTHON ?= python3
BIN := .venv/bin
# Of 20,000 installed modules few are ever imported: Python compiles those when they are, and keeps that for the next.
PIP := $(BIN)/pip install --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE =

.PHONY: quick test suite torture lint style types docs bench gpu clean

quick: .venv/installed
	$(BIN)/cyclebench run quick $(QUICK)

# Types are checked beside the tests, which do not keep two cores busy all the time.
test: style
	$(MAKE) --no-print-directory --jobs=2 types suite

# SELECT=: those too that take many seconds, as .ci/run has them.
SELECT ?= not slow and not long
suite: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal -m '$(SELECT)'

# The tests whose size is small by default, at their full one: kills, shared stores, broken input, simulations; then those
# that .ci/run has not, since they take long for what others show, too.
torture: .venv/installed
	CYCLEBENCH_KILLS=200 CYCLEBENCH_LEASE_CELLS=200 CYCLEBENCH_LEASE_WORKERS=8 CYCLEBENCH_FUZZ=4000 \
	    CYCLEBENCH_UPGRADE_KILLS=50 CYCLEBENCH_TRACKING_KILLS=40 CYCLEBENCH_SIMULATIONS=1 CYCLEBENCH_FLIPS=200 \
	    CYCLEBENCH_ARCHIVE_FLIPS=400 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m 'not slow' \
	    tests/test_kill.py tests/test_lease.py tests/test_bad_input.py tests/test_upgrade.py \
	    tests/test_integrity.py tests/test_orphans.py tests/test_tracking_complete.py tests/test_transfer_broken.py \
	    tests/test_stats_*.py tests/test_null_studies.py
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 -m torture

lint: style types

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# The site, into site/: seconds, without a network. Pages of reference are made from the code (docs/reference.py).
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/installed
	$(PIP) --quiet --editable '.[docs]'
	touch $@

bench: .venv/installed
	$(BIN)/cyclebench bench

# A few minutes on a GPU: the tests that need one, the figures, then a study for the time that is left. GPU="--minutes 4
# --only study" goes on with it. Where the GPU is there may be torch but no network: then take the wheels of what else is
# missing along in a folder (`pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels NAME==VERSION`),
# and `make gpu WHEELS=wheels` puts them into a folder beside the torch of $(PYTHON), whose own packages stay as they are.
ifdef WHEELS
gpu: .gpu/installed
	PYTHONPATH=$(CURDIR)/.gpu $(PYTHON) -m bench.perf.gpu $(GPU)
else
gpu: .venv/installed
	$(BIN)/python -m bench.perf.gpu $(GPU)
endif

.gpu/installed: $(wildcard $(WHEELS)/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .gpu $(WHEELS)/*.whl
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .gpu site .mypy_cache .pytest_cache .ruff_cache
