# make help · everything happens in .venv, which is made once and kept.
PYTHON ?= python3
COMMA := ,
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
BENCH_STAMP := $(VENV)/benchmarks/.installed
QUICKSTART_EXTRAS := eval$(COMMA)log
# The newest Megatron-Core that setup.py allows. Beside the one in .venv, and in its place where PYTHONPATH names it.
NEWEST_MEGATRON := 0.19.2
NEWEST := $(VENV)/megatron-core-$(NEWEST_MEGATRON)
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-newest-megatron test-gpu lint format bench

help:
	@echo "make quickstart   train, export and evaluate a small MM1 model on this machine's CPU; writes runs/quickstart/report.html"
	@echo "make test         run the tests (also: make test ARGS='tests/unit -k packing')"
	@echo "make test-newest-megatron   run those of them that matter with Megatron-Core $(NEWEST_MEGATRON) instead of .venv's"
	@echo "make test-gpu     run the tests that need a GPU"
	@echo "make lint         ruff and mypy;  make format: let ruff rewrite"
	@echo "make bench NAME=  run one benchmark of benchmarks/ (without NAME: list them)"
	@echo "make venv         only set up .venv (PYTHON=python3.12 chooses the interpreter)"

venv: $(STAMP)

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) for $(2) (minutes the first time: PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/ci-cpu.txt --editable '.[$(1)]'
	@touch $@
endef

$(STAMP): setup.py pyproject.toml constraints/ci-cpu.txt
	$(call install,$(QUICKSTART_EXTRAS),running)

$(DEV_STAMP): setup.py pyproject.toml constraints/ci-cpu.txt
	$(call install,dev,tests and benchmarks)
	@touch $(STAMP)

# Its metadata asks for Python 3.12; built from source it runs on 3.11 too.
$(NEWEST): | $(DEV_STAMP)
	@echo "installing Megatron-Core $(NEWEST_MEGATRON) into $@"
	@rm -rf $@.part
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@.part --no-deps \
		--ignore-requires-python --no-binary megatron-core megatron-core==$(NEWEST_MEGATRON)
	@mv $@.part $@

$(BENCH_STAMP): benchmarks/requirements.txt $(DEV_STAMP)
	@echo "installing what the benchmarks compare with into $(VENV)/benchmarks"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/benchmarks \
		-r benchmarks/requirements.txt
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/python examples/quickstart/run.py

test: $(DEV_STAMP) $(NEWEST) $(BENCH_STAMP)
	@echo "all tests, CPU only: about 22 minutes on 2 cores; the slowest 15 are listed at the end"
	@$(BIN)/python -m pytest $(ARGS)

test-newest-megatron: $(DEV_STAMP) $(NEWEST)
	@PYTHONPATH=$(abspath $(NEWEST)) $(BIN)/python -c \
		'import importlib.metadata as m; print("Megatron-Core", m.version("megatron-core"))' | \
		grep -x "Megatron-Core $(NEWEST_MEGATRON)" || { echo "error: $(NEWEST) is not what Python imports"; exit 1; }
	@PYTHONPATH=$(abspath $(NEWEST)) $(BIN)/python -m pytest @tests/newest_megatron.txt $(ARGS)

test-gpu: $(DEV_STAMP)
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
		{ echo "error: PyTorch sees no GPU here"; exit 1; }
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: $(DEV_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BENCH_STAMP)
	@test -n "$(NAME)" || { echo "make bench NAME=…, one of:"; \
		ls benchmarks/*.py | xargs -rn1 basename -s .py | grep -vxE 'common|corpora|made'; exit 1; }
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)
