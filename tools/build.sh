#!/usr/bin/env bash
# Configures and builds one of the project's build trees.
#
#   tools/build.sh release|asan|tsan|fuzz|bench|lint [target...]     lint: only configured, for its compile commands
set -euo pipefail
cd "$(dirname "$0")/.."

kind=$1
shift
dir=build/$kind
options=(-DCMAKE_BUILD_TYPE=Release -DVICUS_BUILD_CLI=ON)
clang=(-DCMAKE_CXX_COMPILER=clang++-19)
# Shared sanitizer runtimes, so that Python can load an instrumented library (run_tests.sh preloads them). -O1 and one
# vector target: the code is the same for every target, and these builds are not run for speed.
sanitized() {
  local runtime
  runtime=$(dirname "$(clang++-19 -print-file-name="libclang_rt.asan-$(uname -m).so")")
  options+=("${clang[@]}" "-DVICUS_SANITIZE=$1" -DVICUS_CPU_TARGETS=AVX2 -DVICUS_BUILD_TESTS=ON
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -shared-libsan"
    "-DCMAKE_EXE_LINKER_FLAGS=-shared-libsan -Wl,-rpath,$runtime"
    "-DCMAKE_SHARED_LINKER_FLAGS=-shared-libsan -Wl,-rpath,$runtime"
    "-DCMAKE_MODULE_LINKER_FLAGS=-shared-libsan -Wl,-rpath,$runtime")
}
case "$kind" in
  release)
    dir=build
    options+=(-DVICUS_BUILD_TESTS=ON)
    # The PyTorch package, where tools/setup.sh installed PyTorch.
    [[ -f .venv/requirements-torch.txt ]] && options+=(-DVICUS_BUILD_TORCH=ON "-DPython_EXECUTABLE=$PWD/.venv/bin/python")
    ;;
  asan) sanitized address,undefined ;;
  tsan) sanitized thread ;;
  fuzz) options+=("${clang[@]}" -DVICUS_CPU_TARGETS=SSE4 -DVICUS_BUILD_FUZZERS=ON) ;;  # sanitizers: tests/fuzz
  bench) options+=(-DVICUS_BUILD_BENCH=ON) ;;
  lint) options+=("${clang[@]}" -DVICUS_CPU_TARGETS=SSE4 -DVICUS_BUILD_TESTS=ON -DVICUS_BUILD_FUZZERS=ON -DVICUS_BUILD_BENCH=ON) ;;
  *) echo "build.sh: argument is $kind; allowed: release, asan, tsan, fuzz, bench, lint" >&2; exit 2 ;;
esac

mkdir -p "$dir"
read -ra extra <<<"${CMAKE_ARGS:-}"
# CMake tells a story that only matters when it fails.
if ! cmake -S . -B "$dir" -G Ninja "${options[@]}" ${extra[@]+"${extra[@]}"} >"$dir/configure.log" 2>&1; then
  cat "$dir/configure.log" >&2
  exit 1
fi
[[ $kind == lint ]] && exit 0
cmake --build "$dir" --parallel "${JOBS:-$(nproc)}" ${1:+--target "$@"}
