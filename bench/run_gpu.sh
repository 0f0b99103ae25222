#!/usr/bin/env bash
# bench/gpu_test.py with GPU_TEST_ARGS, or bench/gpu.py with GPU_BENCH_ARGS, from this checkout.
#
#   bench/run_gpu.sh test|bench      PYTHON: default .venv/bin/python;  VICUS_LIBRARY: default that of `make build`'s tree
#
# Needs no build where VICUS_LIBRARY names a built _C.so, and no .venv where PYTHON has PyTorch, pytest and hypothesis.
set -euo pipefail
cd "$(dirname "$0")/.."

export VICUS_LIBRARY=${VICUS_LIBRARY:-$PWD/build/src/torch/_C.so}
export PYTHONPATH=$PWD/python:$PWD/tests/python${PYTHONPATH:+:$PYTHONPATH}
[[ -z ${VICUS_CLI:-} && -x build/src/cli/vicus ]] && export VICUS_CLI=$PWD/build/src/cli/vicus
contexts=build/tests/gpu/gpu_contexts
[[ -z ${VICUS_CONTEXTS:-} && -x $contexts ]] && export VICUS_CONTEXTS=$PWD/$contexts
python=${PYTHON:-.venv/bin/python}
case "${1:-}" in
  test) program=bench/gpu_test.py arguments=${GPU_TEST_ARGS:-} ;;
  bench) program=bench/gpu.py arguments=${GPU_BENCH_ARGS:-} ;;
  *) echo "run_gpu.sh: argument is ${1:-}; allowed: test, bench" >&2; exit 2 ;;
esac
read -ra args <<<"$arguments"
exec "$python" "$program" ${args[@]+"${args[@]}"}
