# The commands of the house. `make demo` and `make test` work on a fresh machine: both set up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= work-demo
# Tests wait for processes much of their time: two files at once. On more cores, `make test WORKERS=8`.
WORKERS ?= 2
TESTS := python -m pytest --numprocesses $(WORKERS) --dist loadfile --durations=15

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-slow test-gpu lint types docs bench lock clean

help:
	@echo "make setup      create $(VENV) with the exact versions of requirements.lock (minutes once, seconds after)"
	@echo "make demo       raw images -> shards -> ladder of models -> scores -> report, in $(DEMO)/ (under 20 minutes on 2 cores)"
	@echo "make test       lint, types, documentation and tests (under 15 minutes on 2 cores; WORKERS=2 test files at once)"
	@echo "make test-slow  the long proofs (under 40 minutes on 2 cores)"
	@echo "make test-gpu   what needs a GPU (minutes on one; skipped elsewhere)"
	@echo "make docs       the documentation as a site, in build/docs (warnings are errors; a minute)"
	@echo "make bench      side-by-side speed figures, printed as ratios"
	@echo "make lock       write requirements.lock anew from what $(VENV) holds"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make setup: $(PYTHON) not found: install Python 3.11 or call make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)

demo: setup
	bash infra/demo.sh $(DEMO)

lint: setup
	ruff check .

types: setup
	mypy

# Every link between pages and to files is checked; links elsewhere are listed in build/docs/external-links.txt.
docs: setup
	sphinx-build -q -W --keep-going -c infra/docs/site . build/docs

test: lint types docs
	$(TESTS) -m "not slow and not gpu"

test-slow: setup
	$(TESTS) -m "slow and not gpu"

test-gpu: setup
	$(TESTS) -m gpu

bench: setup
	@for file in tests/bench/[a-z]*.py; do echo "== $$file"; python $$file || exit 1; done

lock: setup
	{ echo "# Exact versions for CPython 3.11 on Linux, written by 'make lock'."; \
	  $(BIN)/python -m pip freeze --all --exclude-editable | grep -viE '^(pip|beeline)=='; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(DEMO) build
