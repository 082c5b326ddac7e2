# make demo: the whole pipeline on this machine. make test: the fast tests. Both install what they need into .venv.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A second Triton, which tests/test_compile.py compiles the kernels with: the one of GPU machines with torch 2.11.
TRITON36 := .triton36/.installed

# vLLM pins much; it has an environment of its own.
VLLM := .vllm
VLLM_INSTALLED := $(VLLM)/.installed

.PHONY: help demo demo-seeds forgetting test test-full test-vllm check bench
help:
	@echo "demo         install and run configs/demo.toml, about 10 minutes on two cores"
	@echo "test         install and run the fast tests, under 10 minutes"
	@echo "test-full    every test that needs no GPU"
	@echo "test-vllm    the tests of the vLLM engine, in an environment of their own; part of test-full"
	@echo "check        ruff, mypy, posttrain check of every recipe"
	@echo "demo-seeds   the demo on three seeds, with the dense control"
	@echo "forgetting   sequential against mixed reinforcement learning on three seeds"
	@echo "bench        seconds per step against TRL"

$(INSTALLED): pyproject.toml constraints.txt .ci/install
	.ci/install $(VENV)
	@touch $@

$(TRITON36): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton36 triton==3.6.0
	@touch $@

$(VLLM_INSTALLED): pyproject.toml constraints.txt constraints-vllm.txt .ci/install .ci/install-vllm .ci/vllm_requirements.py
	.ci/install-vllm $(VLLM)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/posttrain run configs/demo.toml

demo-seeds: $(INSTALLED)
	$(BIN)/python benchmarks/demo_seeds.py

forgetting: $(INSTALLED)
	$(BIN)/python benchmarks/forgetting_seeds.py

test: $(INSTALLED)
	.ci/sandbox
	$(BIN)/python -m pytest -m "not slow"

test-full: $(INSTALLED) $(TRITON36) test-vllm
	.ci/sandbox
	$(BIN)/python -m pytest

test-vllm: $(VLLM_INSTALLED)
	$(VLLM)/bin/python -m pytest tests/vllm_engine

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for config in configs/*.toml; do $(BIN)/posttrain check $$config >/dev/null || exit 1; done

bench: $(INSTALLED)
	$(BIN)/python benchmarks/vs_trl.py
