#!/usr/bin/env bash
# Runs every fuzz target of build/fuzz for FUZZ_SECONDS (60). A crash leaves its input in build/fuzz/crashes and stops.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${FUZZ_SECONDS:-60}
mkdir -p build/fuzz/crashes
shopt -s nullglob
targets=(build/fuzz/tests/fuzz/fuzz_*)
found=0
for target in "${targets[@]}"; do
  [[ -f $target && -x $target ]] || continue
  name=${target##*/}
  corpus=build/fuzz/corpus/$name
  mkdir -p "$corpus"
  seeds=(tests/fuzz/corpus/"${name#fuzz_}")  # inputs kept in the repository, if the target has any
  [[ -d ${seeds[0]} ]] || seeds=()
  log=build/fuzz/$name.log
  if ! "$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -artifact_prefix=build/fuzz/crashes/ \
    "$corpus" ${seeds[@]+"${seeds[@]}"} >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    echo "fuzz: $name failed; its input is in build/fuzz/crashes" >&2
    exit 1
  fi
  echo "fuzz: $name: $(grep -E '^Done ' "$log" | tail -n 1 || true)"
  found=$((found + 1))
done
((found)) || { echo "fuzz: no fuzz target was built" >&2; exit 1; }
