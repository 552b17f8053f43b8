# `make` lists the targets. They use the active virtual environment, or make .venv here if none is active.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-data demo-sft test test-gpu benchmark-gpu test-matrix test-slurm lint format

ifneq ($(words $(CURDIR)),1)
$(error make cannot work in a folder with a space in its path, $(CURDIR): move this checkout)
endif

# An environment is active if its activate script ran (conda's base environment is the system, not an environment).
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
ENVIRONMENT := $(or $(ACTIVE),$(CURDIR)/.venv)
PYTHON := $(ENVIRONMENT)/bin/python
PIP := $(PYTHON) -m pip install --quiet
# What to install if there is no torch yet; a torch that imports is kept, whatever its version and build.
TORCH ?= torch
# Where the last setup of this checkout was for this environment; the number tells checkouts apart.
STAMP := $(ENVIRONMENT)/.megalm-setup-$(firstword $(shell echo '$(CURDIR)' | cksum))
# The environment's own copy of constraints.txt, with the torch that is installed.
PINS := $(ENVIRONMENT)/megalm-constraints.txt

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

setup: $(STAMP) ## install megalm and its tools, unless nothing has changed since the last time

$(PYTHON):
	@for python in python3.11 python3.12 python3.13 python3; do \
		$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		python=; \
	done; \
	test -n "$$python" || { echo "error: no Python 3.11 or newer with venv: install one, or activate an environment" >&2; exit 2; }; \
	shared=; $$python -c 'import torch' 2>/dev/null && shared=--system-site-packages; \
	echo "making $(ENVIRONMENT) with $$($$python --version)$${shared:+, sharing the torch that it has}"; \
	$$python -m venv $$shared $(ENVIRONMENT)

$(STAMP): pyproject.toml constraints.txt | $(PYTHON)
	@echo "installing into $(ENVIRONMENT) (some minutes if nothing is cached)"
	@rm -f $(ENVIRONMENT)/.megalm-setup-*
	@$(PYTHON) -c 'import torch' 2>/dev/null || $(PIP) -c constraints.txt '$(TORCH)'
	@torch=$$($(PYTHON) -c 'from importlib.metadata import version; print(version("torch"))') && \
		sed "s/^torch==.*/torch==$$torch/" constraints.txt > $(PINS)
	@# DeepSpeed has no wheel: it imports torch and these to build itself; its kernels are built when first used.
	@# seqeval has none either, and asks for setuptools-scm in a way that no longer finds what that needs.
	@$(PIP) -c $(PINS) setuptools setuptools-scm wheel ninja packaging py-cpuinfo
	@DS_BUILD_OPS=0 $(PIP) -c $(PINS) --no-build-isolation deepspeed
	@$(PIP) -c $(PINS) --no-build-isolation -e '.[dev]'
	@$(PIP) -c $(PINS) 'kenlm>=0.3' || echo "note: kenlm did not compile, so the curation step perplexity is left out"
	@touch $@

# What the demo trains on: files and folders, or (by default) the text of the Python installation itself.
CORPUS ?=
# Of names of files and folders, a name of their own, also where others are called the same elsewhere.
known_as = $(notdir $(firstword $(realpath $1)))-$(firstword $(shell echo '$(realpath $1)' | cksum))
DEMO := runs/demo$(addprefix -,$(and $(strip $(CORPUS)),$(call known_as,$(wildcard $(CORPUS)))))

# bf16 where this machine multiplies it; a CPU without instructions for it takes ten times as long as for fp32.
PRECISION ?= $(shell grep -qsEw 'avx512_bf16|amx_bf16|bf16' /proc/cpuinfo || nvidia-smi -L >/dev/null 2>&1 \
	&& echo bf16 || echo fp32)
TRAIN = $(PYTHON) megalm/train.py --set train.precision=$(PRECISION)

demo: setup ## train a small model on real text and let it write; CORPUS=path for your own text
	@if test -e $(DEMO)/run/checkpoints/latest; then echo "going on with the text and the run in $(DEMO)"; \
		else $(MAKE) --no-print-directory demo-data; fi
	@$(TRAIN) --config configs/demo.yaml --set run.directory=$(DEMO)/run --set data.tokenizer=$(DEMO)/tokenizer \
		--set data.sources.0.path=$(DEMO)/shards/train --set data.held_out.0.path=$(DEMO)/shards/held_out
	@echo && echo "What it writes:" && echo
	@$(PYTHON) tools/generate.py $(DEMO)/run --prompt "The following" --max-new-tokens 120 --temperature 0.7 --top-p 0.9

# Once there is a checkpoint this is not done again: another tokenizer would leave the model unreadable.
demo-data: setup
	@$(PYTHON) tools/prepare_corpus.py $(or $(CORPUS),--python) --output $(DEMO)/corpus.jsonl.zst
	@$(PYTHON) tools/train_tokenizer.py --corpus $(DEMO)/corpus.jsonl.zst --output $(DEMO)/tokenizer --vocab-size 4096 \
		--overwrite
	@$(PYTHON) tools/write_shards.py --corpus $(DEMO)/corpus.jsonl.zst --tokenizer $(DEMO)/tokenizer \
		--output $(DEMO)/shards --held-out 0.03 --overwrite

# What demo-sft learns: a folder with a classification set (.tsv: text and label, or a number of a name in *labels.txt)
# and a chat set (*alpaca*.json or *chat*.json, .jsonl); by default rows about the Python installation itself.
DATA ?=
ifneq ($(words $(wildcard $(addsuffix /*.*,$(DATA)))),0)
SFT := $(DEMO)-sft-$(call known_as,$(DATA))
else ifeq ($(strip $(DATA)),)
SFT := $(DEMO)-sft
else
$(error DATA=$(DATA) is no folder with files, or has a space in its name: correct the path)
endif
CLASSES := $(if $(DATA),tsv $(wildcard $(DATA)/*.tsv) $(addprefix --names ,$(wildcard $(DATA)/*labels.txt)),python-modules)
CHATS := $(if $(DATA),rows $(wildcard $(DATA)/*alpaca*.json* $(DATA)/*chat*.json*),python-questions)
QUESTION ?= $(if $(DATA),Give three tips for staying healthy.,What does dumps in Python's module json do?)
TRAIN_ON = $(TRAIN) --config configs/demo_$1.yaml --set run.directory=$(SFT)/$1 \
	--set model.init_from=$(DEMO)/run --set data.tokenizer=$(DEMO)/tokenizer \
	--set data.sources.0.path=$(SFT)/$2/train.jsonl --set data.held_out.0.path=$(SFT)/$2/held_out.jsonl

demo-sft: setup ## fine-tune the demo's model to classify and to chat, beside baselines; DATA=folder for your own rows
	@test -e $(DEMO)/run/checkpoints/latest || $(MAKE) demo
	@$(PYTHON) tools/prepare_rows.py $(CLASSES) --output $(SFT)/class_rows
	@$(PYTHON) tools/prepare_rows.py $(CHATS) --output $(SFT)/chat_rows
	@$(call TRAIN_ON,classes,class_rows)
	@$(PYTHON) tools/report_run.py $(SFT)/classes
	@$(PYTHON) benchmarks/classifier_baselines.py --run $(SFT)/classes
	@$(call TRAIN_ON,chat,chat_rows)
	@echo && echo "$(QUESTION)" && echo && echo "Before:"
	@$(PYTHON) tools/generate.py $(DEMO)/run --chat --prompt "$(QUESTION)" --max-new-tokens 60 --temperature 0
	@echo && echo "After:"
	@$(PYTHON) tools/generate.py $(SFT)/chat --chat --prompt "$(QUESTION)" --max-new-tokens 60 --temperature 0

test test-gpu test-matrix test-slurm: export OMP_NUM_THREADS ?= 1

# Two at a time: most tests are of one process, and those of many ranks fill two cores as they are.
test: setup ## run every test this machine can run
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup ## run the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu

benchmark-gpu: setup ## test and measure megalm on a CUDA device, into runs/gpu (20 minutes)
	PYTHON=$(PYTHON) benchmarks/gpu.sh

test-matrix: setup ## hold every layout against one process, and write what is proved (two hours on two cores)
	$(PYTHON) -m tests.distributed.matrix
	$(PYTHON) tools/write_support_docs.py
	MEGALM_ALL_PAIRS=1 $(PYTHON) -m pytest tests/training/test_another_layout.py

test-slurm: setup ## hit runs on a real Slurm cluster, started here, by every fault (half an hour on two cores)
	MEGALM_SLURM=1 $(PYTHON) -m pytest tests/slurm
	$(PYTHON) -m tests.slurm.faults --runs 5 --output runs/faults.jsonl

lint: setup ## check style, types and that the written docs are current
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) tools/write_config_docs.py --check
	$(PYTHON) tools/write_support_docs.py --check

format: setup ## rewrite the code in the house style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
