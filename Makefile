# `make demo` and `make test` each do all set-up first; run again, set-up costs nothing.
# Variables: PYTHON (interpreter to build .venv with), DEMO_FLAGS, TEST_FLAGS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.bench-installed
CROSSCHECK_STAMP := $(VENV)/.crosscheck-installed
GPU_STAMP := $(VENV)/.gpu-installed
CROSS_RUNTIME := $(VENV)/aarch64
CROSS_PACKAGES := g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
LESS_NOISE := sed -u -E '/^(Ignoring |Requirement already satisfied|Looking in )/d'
PYTHON ?=
PYTHON_CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3

DEMO_OUT ?= runs/demo
DEMO_FLAGS ?= --trials 24 --steps 120 --population 8 --seed 0
TEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Pyright runs from its wheel, with node from a wheel; without this it would ask a registry for news.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all crosscheck check format bench-deps cross-deps gpu-deps cuda-deps clean distclean FORCE

help:
	@echo 'make demo        set up, then search a small space of language models and compile its Pareto front'
	echo 'make test        set up, then run the default tests'
	echo 'make test-all    every test: slow, tuning, cuda, crosscheck and ray_cluster too'
	echo 'make crosscheck  install timm and transformers, then compare the zoo with their models'
	echo 'make check       lint, format, types, layers'
	echo 'make format      rewrite the sources as the formatter wants them'
	echo 'make bench-deps  install what `nas bench --against onnxruntime,openvino` and tests/bench need'
	echo 'make cross-deps  install what compiles for 64-bit Arm and runs the result here: a compiler, an emulator, a runtime'
	echo 'make gpu-deps    install what runs OpenCL kernels here: a platform on the processor, and its Python binding'
	echo 'make cuda-deps   install what compiles for NVIDIA GPUs here, no GPU needed: the CUDA compiler, 280 MB'
	echo 'make clean       remove caches; `make distclean` removes $(VENV) too; neither touches runs/'

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/nas search searchspaces/tiny_lm.yaml --target cpu --out $(DEMO_OUT) $(DEMO_FLAGS)

test: $(STAMP)
	@$(BIN)/python -m pytest $(TEST_FLAGS)

test-all: $(CROSSCHECK_STAMP) cross-deps gpu-deps
	@$(BIN)/python -m pytest $(TEST_FLAGS) -m ''

crosscheck: $(CROSSCHECK_STAMP)
	@$(BIN)/python -m pytest $(TEST_FLAGS) -m crosscheck tests/crosscheck

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix-only --exit-zero
	$(BIN)/ruff format

bench-deps: $(BENCH_STAMP)

# Tests for 64-bit Arm skip, saying so, without these; so nothing here is an error.
cross-deps: $(STAMP)
	@if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static; } >/dev/null; then
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then
	    echo 'Installing $(CROSS_PACKAGES)'
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	      $(CROSS_PACKAGES) >/dev/null; } || echo 'Left out: apt-get could not install them'
	  else
	    echo 'Left out, for want of apt-get or of the rights: $(CROSS_PACKAGES)'
	  fi
	fi
	if [ ! -e $(CROSS_RUNTIME)/.complete ] || [ requirements.lock -nt $(CROSS_RUNTIME)/.complete ]; then
	  echo 'Fetching the TVM runtime for 64-bit Arm: wheels of 95 MB, of which 5 MB are kept'
	  rm -rf $(CROSS_RUNTIME)
	  wheels=$$(mktemp -d)
	  trap 'rm -rf "$$wheels"' EXIT
	  if $(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: \
	      --platform manylinux_2_28_aarch64 --dest "$$wheels" $$(grep -oE '^apache-tvm(-ffi)?==[^ ;]+' requirements.lock)
	  then
	    mkdir $(CROSS_RUNTIME)
	    for wheel in "$$wheels"/*.whl; do $(BIN)/python -m zipfile -e "$$wheel" "$$wheels/unpacked"; done
	    cp "$$wheels"/unpacked/tvm/lib/libtvm_runtime.so "$$wheels"/unpacked/tvm_ffi/lib/libtvm_ffi.so $(CROSS_RUNTIME)
	    touch $(CROSS_RUNTIME)/.complete
	  else
	    echo 'Left out: the wheels could not be fetched'
	  fi
	fi

# Tests of OpenCL skip, saying so, without these; so nothing here is an error.
gpu-deps: $(STAMP)
	@if [ ! -e $(GPU_STAMP) ] || [ requirements-gpu.lock -nt $(GPU_STAMP) ]; then
	  if $(PIP_INSTALL) --no-deps -r requirements-gpu.lock | $(LESS_NOISE); then touch $(GPU_STAMP)
	  else echo 'Left out: the packages could not be installed'; fi
	fi

# `nas compile --target cuda` names this target where there is no nvcc; tests skip, saying so.
cuda-deps: $(STAMP)
	@$(PIP_INSTALL) --no-deps -r requirements-cuda.lock | $(LESS_NOISE)

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks build dist *.egg-info
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf $(VENV)

# The stamp is written last and holds the folder: an interrupted or a moved installation is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): requirements.lock pyproject.toml
	@fail() { printf '%s\n' "$$@" >&2; exit 1; }
	command -v gcc >/dev/null || fail 'error: gcc not found: compiled models are linked with it.' \
	  'On Debian: apt install gcc'
	python=
	for name in $(or $(PYTHON),$(PYTHON_CANDIDATES)); do
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$$name; break; fi
	done
	[ -n "$$python" ] || fail 'error: no Python >= 3.10 among: $(or $(PYTHON),$(PYTHON_CANDIDATES)).' \
	  'On Debian: apt install python3 python3-venv; or name one: make PYTHON=/path/to/python'

	# One set-up at a time. pip inherits the lock, so a new set-up also waits for what a killed one left running.
	exec 9< requirements.lock
	flock --nonblock 9 || { echo 'Waiting for another set-up of this folder to end'; flock 9; }
	if [ "$$(cat $(STAMP) 2>/dev/null)" = '$(CURDIR)' ] && [ $(STAMP) -nt requirements.lock ] \
	    && [ $(STAMP) -nt pyproject.toml ]; then exit 0; fi
	rm -f $(STAMP) $(BENCH_STAMP) $(CROSSCHECK_STAMP) $(GPU_STAMP)

	if [ -e $(VENV)/.installing ] || ! head -n 2 $(BIN)/pip 2>/dev/null | grep -qF '$(CURDIR)/$(BIN)/' \
	    || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	  "$$python" -c 'import ensurepip, venv' 2>/dev/null \
	    || fail "error: $$python has no venv module." 'On Debian: apt install python3-venv'
	  echo "Creating $(VENV) with $$("$$python" --version)"
	  "$$python" -m venv --clear $(VENV)
	fi
	echo 'Installing requirements.lock into $(VENV): about 80 packages, a minute or two the first time'
	touch $(VENV)/.installing
	$(PIP_INSTALL) -r requirements.lock | $(LESS_NOISE)
	rm $(VENV)/.installing
	$(PIP_INSTALL) --quiet --no-deps --no-build-isolation --editable .
	echo '$(CURDIR)' > $(STAMP)

$(BENCH_STAMP): $(STAMP) requirements-bench.lock
	@$(PIP_INSTALL) -r requirements.lock -r requirements-bench.lock | $(LESS_NOISE)
	touch $(BENCH_STAMP)

$(CROSSCHECK_STAMP): $(STAMP) requirements-crosscheck.lock
	@$(PIP_INSTALL) --no-deps -r requirements-crosscheck.lock | $(LESS_NOISE)
	touch $(CROSSCHECK_STAMP)
