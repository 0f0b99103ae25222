# Everything a person does with vicus from a checkout. `make help` lists it; a target that needs a package or a Python
# tool installs it first (tools/setup.sh). The release build is in build/, the others are in folders below it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
# Options for every configure step, for example CMAKE_ARGS=-DBUILD_SHARED_LIBS=OFF
CMAKE_ARGS ?=
# Seconds for each fuzz target.
FUZZ_SECONDS ?= 60
# Which Python tests run, and how: PYTEST_ARGS='-k merge' for a look at one thing.
PYTEST_ARGS ?=
# Options of bench/gpu_test.py (GPU_TEST_ARGS=--sanitize) and bench/gpu.py.
GPU_TEST_ARGS ?=
GPU_BENCH_ARGS ?=
export JOBS CMAKE_ARGS FUZZ_SECONDS PYTEST_ARGS GPU_TEST_ARGS GPU_BENCH_ARGS

# Checkouts in different folders share one compiler cache.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

.PHONY: help setup setup-clang setup-torch build demo test test-asan test-tsan fuzz bench-cpu gpu-test gpu-bench lint format install clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo 'Variables: JOBS=$(JOBS) PREFIX=$(PREFIX) FUZZ_SECONDS=$(FUZZ_SECONDS) CMAKE_ARGS=$(CMAKE_ARGS)'

setup:  ## install missing packages, and the Python tools in .venv
	@tools/setup.sh build

setup-clang:
	@tools/setup.sh build clang

build: setup  ## the library and the command line, in build/
	@tools/build.sh release vicus vicus_cli

demo: build  ## denoise a photograph and compare with scikit-image
	@.venv/bin/python tools/demo.py build/src/cli/vicus out

setup-torch:
	@tools/setup.sh build torch

test: setup-torch  ## every test on the release build
	@tools/build.sh release
	@tools/run_tests.sh release

test-asan: setup-clang  ## every test under AddressSanitizer and UndefinedBehaviorSanitizer
	@tools/build.sh asan
	@tools/run_tests.sh asan

test-tsan: setup-clang  ## every test under ThreadSanitizer
	@tools/build.sh tsan
	@tools/run_tests.sh tsan

fuzz: setup-clang  ## fuzz the parsers, FUZZ_SECONDS each
	@tools/build.sh fuzz
	@.venv/bin/python tests/fuzz/run_fuzzers.py build/fuzz/tests/fuzz --seconds $(FUZZ_SECONDS)

bench-cpu: setup-torch  ## measure the CPU engine; JSON under bench/results/cpu
	@tools/build.sh bench
	@bench/run_cpu.sh

# On a machine that cannot install or build: VICUS_LIBRARY names the extension, PYTHON an interpreter with PyTorch.
gpu-library = [[ -n "$${VICUS_LIBRARY:-}" ]] || { tools/setup.sh build torch && tools/build.sh release vicus_torch vicus_cli gpu_contexts; }

gpu-test:  ## test on this machine's GPU; JSON under bench/results
	@$(gpu-library)
	@bench/run_gpu.sh test

gpu-bench:  ## measure on this machine's GPU; JSON under bench/results
	@$(gpu-library)
	@bench/run_gpu.sh bench

lint: setup-clang  ## formatting and static analysis, C++ and Python
	@tools/lint.sh

format: setup-clang  ## rewrite the sources in house style
	@tools/lint.sh --fix

install: build  ## install into PREFIX
	@cmake --install build --prefix '$(PREFIX)'

clean:  ## remove what was built; .venv stays
	rm -rf build
