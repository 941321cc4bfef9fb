# Everything a person types. Each target sets up .venv first, whatever environment is active, so a fresh clone needs
# nothing but Python 3.11, g++ and make. Settings go through ARGS: make rl ARGS="train.steps=10 run.name=try"
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup rl draw test test-fast soak check format base bench ui

PYTHON ?= python3.11
PORT ?= 5000
# The first experiment in the view that every run writes; without the rest of the address MLflow shows other things first.
PAGE := \#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=rl
ARGS ?=
# Relative, because make cannot hold a path with a space; a recipe's folder is always the checkout.
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
SHEET := --prompts assets/tiny/data/heldout.parquet --limit 24 --guidance 1 --steps 20
PYTEST := -n 3 --dist loadfile --no-loadscope-reorder

export PYTHON
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)
unexport PYTHONHOME

# The venv holds a CPU build of torch. Should someone have put a CUDA build there, DeepSpeed is left to find the device.
ifeq ($(shell grep -qs "^cuda.*= None" $(VENV)/lib/python3.11/site-packages/torch/version.py || test ! -e $(VENV) && echo cpu),cpu)
export DS_ACCELERATOR := cpu
endif
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# One thread a process: several run side by side, and two threads collapse when anything else wants a core. Not so in
# `base`, whose trainings run one after another and choose for themselves.
rl draw test test-fast soak bench: export OMP_NUM_THREADS ?= 1

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the virtual environment .venv, with everything in it (other targets call it)

$(STAMP): requirements-cpu.lock pyproject.toml tools/setup.sh tools/repair_cpu_stack.py tools/cpu_stack_hook.py
	@tools/setup.sh

# A copied or moved checkout: the stamp names the place it was made for.
ifneq "$(shell cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

rl: setup  ## reinforcement learning on the tiny world: about nine minutes, ends with a table and a picture
	$(RUN) stages/rl.py --recipe tiny-rl $(ARGS)

draw: setup  ## a sheet of the tiny world's held-out prompts, also by the model that make rl has trained
	@rm -rf runs/draw/before runs/draw/after
	$(RUN) stages/generate.py --weights assets/tiny/model --out runs/draw/before $(SHEET) $(ARGS)
	@if [ -e runs/tiny-rl/model ]; then \
		$(RUN) stages/generate.py --weights runs/tiny-rl --out runs/draw/after $(SHEET) $(ARGS); fi

# Three files side by side, the slow ones first: much of a test's time is waiting for processes to start.
test: setup  ## all tests; one of them: make test ARGS="-n 0 tests/test_setup.py -k alias"
	$(RUN) -m pytest $(PYTEST) -m "not soak" $(ARGS)

test-fast: setup  ## nine in ten of the tests, in less than a minute: those without Ray, vLLM and other processes
	$(RUN) -m pytest $(PYTEST) -m "not (ray or vllm or processes or slow or gpu)" $(ARGS)

soak: setup  ## long trials with tables (docs/soak.md): about three hours
	$(RUN) -m soak $(ARGS)
	$(RUN) -m pytest -n 0 -m soak

check: setup  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## let ruff put the code in order
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

base: setup  ## remake the tiny world and its models in assets/ (hours)
	$(RUN) -m stages.base.make_all $(ARGS)

bench: setup  ## the benchmarks
	$(RUN) -m benchmarks $(ARGS)

ui: setup  ## the pages of all runs (MLflow)
	@mkdir -p runs
	@echo "MLflow: http://127.0.0.1:$(PORT)/$(PAGE)  (Ctrl-C ends it)"
	$(RUN) -m mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port $(PORT)
