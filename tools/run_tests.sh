#!/usr/bin/env bash
# Runs every test of one build (tools/build.sh) and prints the sum as the last line.
#
#   tools/run_tests.sh release|asan|tsan
set -uo pipefail
cd "$(dirname "$0")/.."

kind=$1
dir=build/$kind
jobs=${JOBS:-$(nproc)}
preload=()
python_tests=(tests/python tests/cli tests/geometry tests/jit tests/gpu)
runtime() { clang++-19 -print-file-name="libclang_rt.$1-$(uname -m).so"; }
case "$kind" in
  release) dir=build ;;
  asan)
    # Python itself leaks by design; the C++ tests are checked for leaks.
    preload=("LD_PRELOAD=$(runtime asan)" ASAN_OPTIONS=detect_leaks=0)
    export LSAN_OPTIONS="suppressions=$PWD/tools/lsan.supp:print_suppressions=0 ${LSAN_OPTIONS:-}"
    ;;
  tsan)
    # Archer tells ThreadSanitizer what OpenMP's barriers and joins order; without it every parallel loop is a report.
    export OMP_TOOL_LIBRARIES=/usr/lib/llvm-19/lib/libarcher.so
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1 ${TSAN_OPTIONS:-}"
    preload=("LD_PRELOAD=$(runtime tsan)")
    ;;
  *) echo "run_tests.sh: argument is $kind; allowed: release, asan, tsan" >&2; exit 2 ;;
esac
# What tests/install and tests/emulation build is not instrumented: one run of it is enough.
if [[ $kind == release ]]; then
  python_tests+=(tests/install tests/emulation tests/torch tests/nn)
else
  python_tests+=('--ignore-glob=tests/gpu/test_gpu_*')  # they need PyTorch, which is not instrumented either
fi
export UBSAN_OPTIONS="print_stacktrace=1 ${UBSAN_OPTIONS:-}"
# Several test processes share the cores: threads that wait for work must not burn the time of others.
export OMP_WAIT_POLICY=passive

reports=build/reports/$kind
rm -rf "$reports"
mkdir -p "$reports"
status=0
ctest --test-dir "$dir" --output-on-failure --no-tests=error --parallel "$jobs" --timeout 900 \
  --output-junit "$PWD/$reports/ctest.xml" 2>&1 | grep -vE '^ +Start |Passed +[0-9.]+ sec$' || status=$?
read -ra extra <<<"${PYTEST_ARGS:-}"
env ${preload[@]+"${preload[@]}"} VICUS_CLI="$PWD/$dir/src/cli/vicus" VICUS_CONTEXTS="$PWD/$dir/tests/gpu/gpu_contexts" \
  VICUS_BRIDGE="$PWD/$dir/tests/bridge/libvicus_bridge.so" \
  VICUS_BUILD="$PWD/$dir" VICUS_LIBRARY="$PWD/$dir/src/torch/_C.so" PYTHONPATH="$PWD/python" .venv/bin/python -m pytest -q -n "$jobs" --junitxml="$reports/pytest.xml" \
  ${extra[@]+"${extra[@]}"} "${python_tests[@]}" || status=$?
# Results measured on GPUs age when kernels change; that is no failure.
[[ $kind == release ]] && .venv/bin/python bench/gpu_evidence.py
.venv/bin/python tools/test_summary.py --status "$status" "$reports"
