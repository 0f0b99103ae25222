#!/usr/bin/env bash
# The peers in a virtual environment of their own, made when it is missing or bench/requirements.txt changed; then
# bench/cpu.py with BENCH_ARGS. The driver is built before (make bench-cpu does it).
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=bench/.venv/requirements.txt
if ! cmp -s bench/requirements.txt "$stamp"; then
  echo "bench: PyTorch in bench/.venv"
  [[ -x bench/.venv/bin/python ]] || python3 -m venv bench/.venv
  bench/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
  cp bench/requirements.txt "$stamp"  # last: an interrupted install is done again
fi
read -ra args <<<"${BENCH_ARGS:-}"
exec bench/.venv/bin/python bench/cpu.py ${args[@]+"${args[@]}"}
