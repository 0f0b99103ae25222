#!/usr/bin/env bash
# Formatting and static analysis of everything git tracks. --fix rewrites the formatting.
set -uo pipefail
cd "$(dirname "$0")/.."

mapfile -t cpp < <(git ls-files '*.cc' '*.h' '*.hpp' '*.cpp' '*.cu' '*.cuh')
if [[ ${1:-} == --fix ]]; then
  clang-format-19 -i "${cpp[@]}" && .venv/bin/ruff format --quiet . && .venv/bin/ruff check --quiet --fix .
  exit
fi

status=0
step() {  # every step runs, so that one call shows everything
  local name=$1
  shift
  echo "lint: $name"
  "$@" || status=1
}
tidy() {
  tools/build.sh lint && run-clang-tidy-19 -quiet -p build/lint -j "${JOBS:-$(nproc)}" -warnings-as-errors='*' \
    '^(?!.*/embedded\.cc$)' >build/lint/tidy.log 2>&1 && return
  grep -E 'warning:|error:' -A 4 build/lint/tidy.log | head -n 200
  return 1
}
step clang-format clang-format-19 --dry-run -Werror "${cpp[@]}"
step ruff .venv/bin/ruff check --quiet .
step 'ruff format' .venv/bin/ruff format --check --quiet .
step clang-tidy tidy
((status)) || echo 'lint: clean'
exit "$status"
