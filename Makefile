# Every target can be called again at once: the set-up is stamped and reused.
VENV := .venv/bin/python
STORE ?= file
ARGS ?=
DATA_ARGS ?=
PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

setup:  ## create .venv with torch, the project and what its tests need
	@bash scripts/setup.sh

demo: setup  ## simulate, train, kill, resume, evaluate, report (STORE=file or STORE=s3)
	@$(VENV) scripts/demo.py --store $(STORE)

test: setup  ## run the tests in PROCESSES=2 processes (ARGS="-k cli" is passed on to pytest)
	@OMP_NUM_THREADS=1 $(VENV) -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup  ## ruff check, ruff format --check, mypy
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy

gpu-check: setup  ## on a machine with a CUDA GPU: strategies, precisions, memory, MFU; simulators, batches (docs/results/gpu*.md)
	@$(VENV) scripts/gpu_check.py --markdown docs/results/gpu.md $(ARGS)
	@$(VENV) scripts/gpu_data.py --markdown docs/results/gpu_data.md $(DATA_ARGS)

clean:  ## remove caches and the demo's output, keep .venv
	@rm -rf .keel/demo-* .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist keel.egg-info/SOURCES.txt
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
