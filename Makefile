# make demo: from nothing to a served model.  make test: everything that CI runs.  make help: the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
LOCKS := toolkit/environments/locks
# Cores that tests use at once: a real engine takes gigabytes of memory.
CORES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
RECIPE ?= recipes/demo/tickets.yaml
CPU_ENVIRONMENTS := train-cpu quantize-cpu vllm-cpu router ray
# Tests in these folders import torch and run in their stage's environment, not in the core.
CORE_TESTS := --ignore-glob='*/integration/in_*'

# A machine behind a mirror is often set up for pip alone; uv has names of its own for the same.
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifneq ($(PIP_EXTRA_INDEX_URL),)
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif

# Images set this; with it every step would compile torch and its like again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo setup test check integration slow format docs lock wheel

help: ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.core ## fine-tune, evaluate, quantize and serve a small real model on this machine
	@$(BIN)/toolkit env sync train quantize vllm
	$(BIN)/toolkit run $(RECIPE)

setup: $(VENV)/.dev ## .venv with the toolkit and its development tools

# The only step that needs pip: it fetches uv, checked against the hashes of the lock; uv does the rest.
$(VENV)/.uv: $(LOCKS)/core.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), and 3.11 or newer is needed: make PYTHON=..." >&2; exit 3; }
	$(PYTHON) -c 'import ensurepip' || { echo "error: apt-get install python3-venv" >&2; exit 3; }
	echo "setting up $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	awk '/^[^ #]/ { wanted = /^uv==/ } wanted' $< > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	touch $@

$(VENV)/.core: $(VENV)/.uv pyproject.toml
	@$(UV) pip install --python $(BIN)/python --require-hashes -r $(LOCKS)/core.txt
	$(UV) pip install --python $(BIN)/python --no-deps --build-constraints $(LOCKS)/dev.txt -e .
	touch $@

# Tools go on top of the core; pytest also into a folder of its own, for the tests inside stage environments.
$(VENV)/.dev: $(VENV)/.core $(LOCKS)/dev.txt
	@$(UV) pip install --python $(BIN)/python --require-hashes -r $(LOCKS)/dev.txt
	$(UV) pip install --python $(BIN)/python --target $(VENV)/pytest --no-deps -c $(LOCKS)/dev.txt \
	  pytest pytest-timeout pytest-xdist execnet pluggy iniconfig pygments
	touch $@

test: check integration ## everything: check, then the tests with real models and engines

check: setup ## format, lint, types, fast tests: under two minutes
	@$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --num-workers $(CORES)
	$(BIN)/pytest -q -n $$(($(CORES) + 1)) --dist loadfile --no-loadscope-reorder -m "not integration and not gpu" $(CORE_TESTS)

# For the tests of the kernels of training, which Triton interprets; no environment on a CPU needs it.
$(VENV)/triton: $(VENV)/.uv $(LOCKS)/train-cuda.txt
	@awk '/^[^ #]/ { wanted = /^triton==/ } wanted' $(LOCKS)/train-cuda.txt > $(VENV)/triton.txt
	$(UV) pip install --python $(BIN)/python --python-version 3.11 --target $@ --no-deps --require-hashes -r $(VENV)/triton.txt
	touch $@

# Threads of torch that wait by spinning take the cores from those that work: 10 times the CPU time was seen.
integration: export OMP_WAIT_POLICY := PASSIVE
integration: check $(VENV)/triton
	@$(BIN)/toolkit env sync $(CPU_ENVIRONMENTS)
	PATH="$$PATH:$(CURDIR)/$(BIN)"  # fetch needs uv
	for stage in train quantize; do
	  test ! -d tests/integration/in_$$stage || $(BIN)/toolkit env run $$stage-cpu -- \
	    env PYTHONPATH="$(CURDIR)/$(VENV)/pytest" OMP_NUM_THREADS=1 \
	    python -m pytest -q -n $(CORES) --dist loadfile --no-loadscope-reorder --durations=10 tests/integration/in_$$stage
	done
	# one more than cores: most of these wait, for Slurm, Ray, an engine's start or a part that is to heal
	$(BIN)/pytest -n $$(($(CORES) + 1)) --dist loadfile --no-loadscope-reorder --durations=20 -m "integration and not slow" $(CORE_TESTS)

slow: setup ## real trainings as jobs that are killed in the middle; needs a machine with nothing else to do
	@$(BIN)/toolkit env sync $(CPU_ENVIRONMENTS)
	$(BIN)/pytest --durations=20 -m slow $(CORE_TESTS)

format: setup ## put the code into the format that check wants
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: setup ## write the pages and the schema that are made from the code
	@$(BIN)/python docs/generate.py

lock: setup ## resolve every lock again (UPGRADE=1 takes newer versions)
	@$(BIN)/python -m toolkit.environments.lock $(if $(UPGRADE),--upgrade)

wheel: setup ## the wheel in dist/
	@$(UV) build --wheel --python $(BIN)/python --build-constraints $(LOCKS)/dev.txt --out-dir dist
