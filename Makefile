# The front door: every target makes its own environment first, and does nothing twice.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
METAWORLD := .venv-metaworld
SBX := .venv-sbx
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: help setup setup-metaworld test-metaworld repro test test-fast campaign lint format bench bench-sbx pipelines lock clean clean-all

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 17

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; OMRL needs Python 3.11 (set PYTHON=...)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

setup: $(STAMP)  ## make the environment in .venv

$(METAWORLD)/.setup-stamp: requirements-metaworld.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; OMRL needs Python 3.11 (set PYTHON=...)" >&2; exit 2; }
	test -x $(METAWORLD)/bin/python || $(PYTHON) -m venv $(METAWORLD)
	$(METAWORLD)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-metaworld.lock
	$(METAWORLD)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

setup-metaworld: $(METAWORLD)/.setup-stamp  ## make the environment of the Meta-World families in .venv-metaworld

test-metaworld: setup-metaworld  ## the tests of the Meta-World families, in their environment
	$(METAWORLD)/bin/python -m pytest tests/test_metaworld.py tests/test_relabel.py -n 2 --dist loadfile

repro: setup  ## rebuild every result of params.yaml and print the table
	omrl check params.yaml
	omrl repro
	@cat reports/results.md
	@echo "report: reports/index.html"

test: setup  ## the whole test suite, end to end included
	python -m pytest tests -n 2 --dist loadfile --durations 5

test-fast: setup  ## unit, property and contract tests only
	python -m pytest tests -n 2 --dist loadfile -m "not e2e"

campaign: setup  ## kills, damage, hostile files and params on clones of the smoke pipeline: docs/reliability.md
	PYTHONPATH=tests python tests/campaign --cases $(or $(CASES),500) --seed $(or $(SEED),0)

lint: setup  ## ruff, format check, types
	ruff check .
	ruff format --check .
	mypy

format: setup  ## format the code
	ruff format .
	ruff check --fix .

bench: setup  ## run every benchmark (some minutes)
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; python $$file || exit 1; done

$(SBX)/.setup-stamp: requirements-sbx.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; OMRL needs Python 3.11 (set PYTHON=...)" >&2; exit 2; }
	test -x $(SBX)/bin/python || $(PYTHON) -m venv $(SBX)
	$(SBX)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-sbx.lock
	@touch $@

bench-sbx: setup $(SBX)/.setup-stamp  ## SAC engines beside SBX (SB3 in JAX), which gets an environment in .venv-sbx
	python benchmarks/engines.py speed

pipelines: setup  ## make every pipelines/<name>/ a DVC project with the root's dvc.yaml
	@for folder in pipelines/*/; do \
	  mkdir -p $$folder/.dvc $$folder/source; \
	  cp dvc.yaml $$folder/dvc.yaml; \
	  cp pipelines/smoke/.dvcignore $$folder/ 2>/dev/null; \
	  cp pipelines/smoke/.dvc/config pipelines/smoke/.dvc/.gitignore $$folder/.dvc/ 2>/dev/null; \
	  for package in omrl stages; do ln -sfn ../../../$$package $$folder/source/$$package; done; \
	done

lock: setup  ## refresh requirements.lock from what is installed
	@{ head -n 1 requirements.lock; python -m pip freeze --all --exclude pip --exclude-editable --disable-pip-version-check | sed 's/+cpu$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:  ## remove caches, unfinished work and what the smoke pipeline left; keep data and results
	rm -rf pipelines/smoke/data pipelines/smoke/reports pipelines/smoke/dvc.lock # for tests only; DVC wants its lock unignored
	rm -rf dvc_plots pipelines/*/dvc_plots
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	rm -rf data/.scratch pipelines/*/data/.scratch
	find omrl stages tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean  ## also remove the environment and all built data (the DVC cache stays)
	rm -rf $(VENV) $(METAWORLD) $(SBX) data pipelines/*/data
