# make run: set-up and the main job. make test: set-up and the tests. Nothing else is needed on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
NATIVE_SOURCES := CMakeLists.txt setup.py $(wildcard cmake/*.cmake csrc/*.txt csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/cuda/device/*.cuh csrc/include/finetune/*.h)

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

run: setup ## fine-tune SmolLM2-135M-Instruct with LoRA on Python's own documentation (about five minutes with the set-up)
	@$(BIN)/python -m finetune run sft

# Two processes, a file of tests at a time; OpenMP's threads sleep while they wait, so that they leave each other the cores.
test: setup $(VENV)/.test-installed ## the tests: default, slow and peer
	@GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

longtest: setup $(VENV)/.test-installed $(VENV)/.llama-cpp-installed ## the tests that take minutes each: all architectures, sanitizers, whole builds
	@$(BIN)/python -m pytest -m long

bench: setup $(VENV)/.test-installed ## time every op against torch
	@$(BIN)/python -m finetune bench

decode: setup $(VENV)/.test-installed $(VENV)/.llama-cpp-native ## time decoding next to llama.cpp and transformers
	@$(BIN)/python -m finetune bench decode_vs_llamacpp

lint: setup $(VENV)/.test-installed ## ruff, mypy, clang-format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h csrc/include/finetune/*.h csrc/cuda/*.cu* csrc/cuda/device/*.cuh modules/*/*/*/code/*/*.cu tests/fixtures/*/*.cu

docs: $(VENV)/.docs-installed ## the READMEs and learning pages as a site in build/docs; a broken link is an error
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html --conf-dir docs . build/docs
	@echo "build/docs/docs/index.html"

clean: ## remove the environment and everything built
	rm -rf $(VENV) build finetune/_native.so *.egg-info

setup: $(VENV)/.native-built

# torch is built against and run with, so it goes in once, before the build, which then needs no environment of its own.
$(VENV)/.base-installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the base packages into $(VENV) (about a minute, once) …"
	@$(PIP) "torch==2.13.0" "setuptools>=77" numpy cmake ninja
	@touch $@

$(VENV)/.native-built: $(VENV)/.base-installed $(NATIVE_SOURCES)
	@echo "building the native kernels (one to four minutes, once) …"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test-installed: pyproject.toml | $(VENV)/.native-built
	@echo "installing the test and peer packages (three to five minutes, once) …"
	@$(PIP) --no-build-isolation --editable ".[test,peers,data]"
	@$(PIP) --no-deps d3rlpy gym gym-notices structlog colorama dataclasses-json marshmallow typing-inspect mypy_extensions megatron-core open-flamingo einops einops-exts
	@touch $@

# Its wheel is built here: with the instructions that every x86 has, and without what shows pictures to a model.
$(VENV)/.llama-cpp-installed: | $(VENV)/.test-installed
	@echo "building llama.cpp, which the tests of GGUF compare with (about ten minutes, once) …"
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AMX_TILE=OFF -DLLAVA_BUILD=OFF" $(PIP) llama-cpp-python==0.3.36
	@touch $@

# To be timed it is built with what this machine has, but for AMX, with which it crashes on weights that it repacks.
$(VENV)/.llama-cpp-native: | $(VENV)/.test-installed
	@echo "building llama.cpp for this machine (about ten minutes, once) …"
	@$(BIN)/python -m pip uninstall -qq -y llama-cpp-python
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF -DLLAVA_BUILD=OFF" \
		$(PIP) --no-cache-dir llama-cpp-python==0.3.36
	@touch $@

$(VENV)/.docs-installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the documentation generator (half a minute) …"
	@$(PIP) sphinx myst-parser furo
	@touch $@

.PHONY: help run test longtest bench decode lint docs clean setup
