#!/usr/bin/env bash
# bench/cpu.py with BENCH_ARGS. The driver and the peers (PyTorch in .venv) are there before: make bench-cpu sees to it.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra args <<<"${BENCH_ARGS:-}"
exec .venv/bin/python bench/cpu.py ${args[@]+"${args[@]}"}
