# Every target sets the machine up first; the second time that costs a fraction of a second.
# Variables can be set on the command line, for example: make demo PYTHON=python3.12 FULL=1

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint serve clean

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# url of PyTorch's CPU wheel index; needed only where the configured index has no CPU build of torch
TORCH_INDEX ?=
# cpu or cuda; empty = cuda when a device answers
MORPHSERVE_EXTRA ?=
export VENV TORCH_INDEX MORPHSERVE_EXTRA

# empty = the demo model, obtained and converted once
MODEL ?=
CONFIG ?= policies/yaml/demo.yaml
WORKLOAD ?= scripts/workloads/convD.jsonl
OUT ?= reports/demo
PORT ?= 8000
FULL ?= 0
PYTEST_ARGS ?=
# test processes side by side; each takes a core, and up to 5 GiB
WORKERS ?= 2
SERVE_ARGS ?=

runs := stock,morphserve$(if $(filter 1,$(FULL)),$(strip ,static_w8,static_w4))
# A shell fragment that leaves the directory of the model in $$model.
with_model = model="$(MODEL)"; model="$${model:-$$($(PY) scripts/demo_model.py | tail -n 1)}"

help:
	@echo "make setup   .venv with vLLM for this machine"
	@echo "make demo    stock vLLM, then MorphServe, on one burst; FULL=1 adds static W8 and static W4"
	@echo "make test    lint, then every test this machine can run; WORKERS=2 processes"
	@echo "make lint    ruff, mypy, import rules"
	@echo "make serve   vllm serve with the plugin on the demo model; PORT=8000"
	@echo "make clean   removes .venv, caches of the tools and reports/demo"

setup:
	@$(PYTHON) scripts/bootstrap.py --quiet

demo: setup
	@$(with_model); $(PY) scripts/replay.py --workload $(WORKLOAD) --compare $(runs) \
		--config $(CONFIG) --out $(OUT) --model "$$model" --enforce-eager

test: lint
	@$(with_model); MORPHSERVE_DEMO_MODEL="$$model" $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m mypy -p policies -p morphserve.controller -m morphserve.monitor -m morphserve.ladder
	@$(VENV)/bin/lint-imports --no-logo

serve: setup
	@$(with_model); exec $(VENV)/bin/vllm serve "$$model" --served-model-name demo --port $(PORT) \
		--plugin morphserve --morphserve-config $(CONFIG) \
		--block-size 32 --num-gpu-blocks-override 49 --max-model-len 512 --max-num-seqs 64 $(SERVE_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info $(OUT)
