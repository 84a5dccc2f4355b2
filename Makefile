# Two commands are all: `make quickstart` and `make test`. The rest is for those who work on the code.

# The first Python that is new enough; `make PYTHON=/path/to/python3.12` names another.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
# What to install beside the library: dev, and cuda or tpu on machines that have them (`make setup EXTRAS=dev,cuda`).
EXTRAS ?= dev
RUN := .venv/bin/python
CONFIG ?= configs/quickstart.py
PYTEST_ARGS ?= -n 2 --dist loadgroup

.PHONY: help setup quickstart test test-slow tpu-compile lint format bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.installed  ## make .venv with everything in it

.venv/.installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.12 or newer is needed; python3 here is: $$(python3 --version 2>&1). Set PYTHON=/path/to/python3.12"; \
		exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 12) and \
		"Python 3.12 or newer is needed; $(PYTHON) is %d.%d. Set PYTHON=/path/to/python3.12" % v[:2] or 0)'
	@echo "setting up .venv (once; a minute or two)"
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

quickstart: setup  ## train a small hybrid on the Python library's source, on CPU, in minutes
	@$(RUN) -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

test: setup  ## run the quick tests
	@$(RUN) -m pytest $(PYTEST_ARGS) -m "not slow"

test-slow: setup  ## run the long tests that `make test` leaves out
	@$(RUN) -m pytest $(PYTEST_ARGS) -m slow

# Beside the packages of .venv, not among them: JAX would look for a TPU wherever libtpu is importable.
.venv/libtpu/.installed: .venv/.installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/libtpu "libtpu==0.0.48.1"
	@touch $@

tpu-compile: setup .venv/libtpu/.installed  ## compile the TPU kernels for four generations, on a machine without any
	@JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_LIBRARY_PATH=$(CURDIR)/.venv/libtpu/libtpu/libtpu.so \
		$(RUN) -m experiments.tpu_compile

lint: setup  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: setup  ## let ruff rewrite what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: setup  ## time the mechanisms on this machine, each checked against its oracle
	@$(RUN) -m experiments.benchmark

clean:  ## remove .venv, runs and caches
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
