# What a person runs here. Every target that needs Python makes .venv first; nothing outside this folder is changed.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-gpu bundled-model clean

BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL_RUN := build/bundled-model
MODEL := src/mxd/bundled/model
ON_GPU = HF_HUB_OFFLINE=1 $(if $(GPU_PYTHON),PYTHONPATH=src:build/gpu:$$PYTHONPATH $(GPU_PYTHON),$(BIN)/python)
GPU_TESTS = $(shell grep -l -e on_gpu -e on_every_device -e mark.gpu tests/test_*.py)
HARDWARE ?= $(shell getconf _NPROCESSORS_ONLN) CPU cores
DATE ?= $(shell date +%F)

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## Run the demo: train, evaluate and compare sparse layers of the bundled model, offline.
	HF_HUB_OFFLINE=1 $(BIN)/mxd demo

lint: $(INSTALLED) ## Check style, types and the direction of imports.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# The second call is without jaxtyping's import hook, which torch.compile cannot trace through.
test: lint ## Run lint and all tests, offline.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
	@if command -v "$${CXX:-g++}" > /dev/null; then \
		set -x; HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -o addopts='' -m compile; \
	else \
		echo "The tests marked compile are left out: torch.compile needs a C++ compiler (apt install g++)."; \
	fi

bench: $(INSTALLED) ## Measure training and inference on this machine's CPU (an hour), beside the peers' packages.
	$(BIN)/python -m pip install -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/train_step.py --kind mxd --dtype float32 bfloat16
	$(BIN)/python benchmarks/train_step.py --kind shared-transcoder --dtype float32 bfloat16
	$(BIN)/python benchmarks/train_step.py --kind transcoder
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/precision.py

# GPU_PYTHON names an interpreter that has torch, mxd's other dependencies and pytest, hypothesis, jaxtyping and beartype;
# then nothing is installed: mxd is taken from src, and its version from a file that stands for an installation.
bench-gpu: $(if $(GPU_PYTHON),,$(INSTALLED)) ## Test what needs a CUDA GPU and measure training there (under 8 minutes).
	@mkdir -p build/gpu/mxd.dist-info
	@sed -n 's/^version = "\(.*\)"/Metadata-Version: 2.1\nName: mxd\nVersion: \1/p' pyproject.toml \
		> build/gpu/mxd.dist-info/METADATA
	@$(ON_GPU) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make bench-gpu needs a CUDA device; torch " \
		+ torch.__version__ + " of " + sys.executable + " finds none. With another torch: make bench-gpu GPU_PYTHON=PATH")'
	$(ON_GPU) -m pytest -m gpu $(GPU_TESTS)
	$(ON_GPU) benchmarks/gpu.py

bundled-model: $(INSTALLED) ## Train the bundled model (hours), or go on where training stopped, and write its card.
	$(BIN)/python scripts/train_bundled_model.py --out $(MODEL_RUN) $(if $(wildcard $(MODEL_RUN)),--resume)
	$(BIN)/python scripts/write_bundled_card.py --run $(MODEL_RUN) --out $(MODEL) \
		--hardware "$(HARDWARE)" --date "$(DATE)"
	cp $(MODEL_RUN)/model/* $(MODEL)/
	chmod a+r $(MODEL)/*

clean: ## Remove .venv, caches and the demo's run; trained models and other runs stay.
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo-run dist
	find src tests scripts benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# Set PYTHON to choose an interpreter; otherwise python3, or the newest of the others where python3 is too old.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
		python=; \
		for name in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
			if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then \
				python=$$name; break; \
			fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "mxd needs Python 3.11 or newer; install it (apt install python3.11 python3.11-venv)," \
				"or name one: make PYTHON=/path/to/python" >&2; \
			exit 2; \
		fi; \
		if ! "$$python" -c 'import ensurepip, venv' > /dev/null 2>&1; then \
			echo "$$python cannot make virtual environments; run: apt install python3-venv" \
				"(for an interpreter of another version, its own: apt install python3.12-venv)." >&2; \
			exit 2; \
		fi; \
		"$$python" -m venv .venv; \
	fi
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@
