# `make help` lists the targets. Variables: PYTHON (interpreter that makes .venv), EXTRAS=gpu, INSTALL=system, DEMO=short.
PYTHON ?= python3
EXTRAS ?= cpu
INSTALL ?= venv
PYTEST_ARGS ?=
TORCH := $(shell grep -x 'torch==.*' constraints.txt)
PY := $(if $(filter system,$(INSTALL)),$(PYTHON),.venv/bin/python)
PIP := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install install-venv install-system kernels demo test test-full test-slurm test-gpu bench lint

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: install-$(INSTALL) ## make .venv; EXTRAS=gpu for CUDA machines; INSTALL=system keeps this Python and its torch

kernels: install ## compile the CUDA kernels, without a GPU too; needs nvcc
	@$(PY) -P -m megatron_conan.kernels.soft_mask_attention.build

demo: install ## train, search and report on this machine's CPU; DEMO=short for a few minutes' worth
	@$(PY) launch/demo.py $(if $(DEMO),--size $(DEMO))

# -P: the checkout must not be on sys.path, its kernels/ would shadow another package of that name
test: install ## all tests that need no GPU and little time, in one pytest process
	@$(PY) -P -m pytest -q -m "not full and not gpu and not slurm" $(PYTEST_ARGS)

test-full: install ## everything that needs no GPU, also what takes long; external data's and (where it is installed) SLURM's tests too
	@$(PY) -P -m pytest -q -m "not gpu" $(PYTEST_ARGS)

test-slurm: install ## stages as jobs of a real SLURM, started on this machine; installs it with apt-get, so as root
	@command -v slurmctld >/dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends slurm-wlm munge; }
	@$(PY) -P -m pytest -q -m slurm $(PYTEST_ARGS)

test-gpu: install ## the tests that need a CUDA GPU
	@$(PY) -P -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  "error: torch " + torch.__version__ + " finds no CUDA GPU, which make test-gpu needs; nvidia-smi lists them")'
	@$(MAKE) --no-print-directory kernels
	@$(PY) -P -m pytest -q -m gpu $(PYTEST_ARGS)

bench: install ## the benchmarks, in their quick form where they have one
	@$(PY) benchmarks/info_nce.py --rows 8192
	@$(PY) benchmarks/contrastive_step.py --quick
	@$(PY) benchmarks/soft_mask_attention.py --quick
	@[ ! -e runs/demo/finetune/checkpoints/latest ] || $(PY) benchmarks/mining.py --quick
	@[ ! -d ../shared/data/lm ] || $(PY) benchmarks/preprocess.py --quick
	@[ ! -e runs/demo/data/weak.json ] || $(PY) benchmarks/training_step.py --quick

lint: install ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

# What .venv was made from. Compared by content, so that switching between commits reinstalls only what changed.
define STATE
$(EXTRAS) $(CURDIR) $(shell cat setup.py constraints.txt | cksum)
endef

install-venv:
	@if [ "$$(cat .venv/installed 2>/dev/null)" = "$(STATE)" ] && $(PY) -c '' 2>/dev/null; then exit 0; fi; \
	set -e; \
	command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: make install PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and \
	  "error: $(PYTHON) is Python " + v + "; 3.11 or newer is needed: make install PYTHON=python3.12")'; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) can make no virtual environment: apt install python3-venv" >&2; exit 1; }; \
	rm -f .venv/installed; \
	$(PY) -c '' 2>/dev/null || { echo "install 1/3: .venv"; $(PYTHON) -m venv --clear .venv; }; \
	echo "install 2/3: $(TORCH)"; \
	$(PIP) install --quiet -c constraints.txt '$(TORCH)'; \
	echo "install 3/3: megatron_conan[$(EXTRAS),dev] and what it needs (some minutes at first)"; \
	$(PIP) install --quiet -c constraints.txt '$(TORCH)' -e '.[$(EXTRAS),dev]'; \
	echo '$(STATE)' > .venv/installed; \
	echo "installed into .venv: $$($(PY) --version), $$($(PIP) freeze | grep -iE '^(torch|megatron-core)=' | paste -sd' ')"

# Prints what is required and missing, one requirement a line; torch and transformer-engine stay the container's.
define MISSING
import re, sys
from importlib.metadata import PackageNotFoundError, requires, version
from pip._vendor.packaging.requirements import Requirement
for requirement in map(Requirement, requires("megatron_conan")):
    extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
    wanted = not extra or extra[1] in ("$(EXTRAS)", "dev")
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = ""
    if wanted:
        print(f"{requirement.name}: {found or 'missing'}", file=sys.stderr)
        if requirement.name not in ("torch", "transformer-engine") and not requirement.specifier.contains(found or "0", True):
            print(f"{requirement.name}{requirement.specifier}")
endef
export MISSING

install-system:
	@set -e; \
	torch="$$($(PY) -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null)" \
	  || { echo "error: $(PYTHON) has no torch; INSTALL=system uses the container's. Without one: make install" >&2; exit 1; }; \
	$(PIP) install --quiet --no-deps --no-build-isolation -e .; \
	missing="$$($(PY) -c "$$MISSING")"; \
	echo "torch $$torch stays"; \
	[ -z "$$missing" ] && exit 0; \
	echo "installing:" $$missing; \
	keep="$$(mktemp)"; trap 'rm -f "$$keep"' EXIT; echo "torch==$$torch" > "$$keep"; \
	printf '%s\n' "$$missing" | xargs -d '\n' $(PIP) install --quiet -c "$$keep"
