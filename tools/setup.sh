#!/usr/bin/env bash
# Installs what is missing and nothing else, so that calling it again costs nothing: Debian packages, then the Python
# tools of tools/requirements.txt in .venv.
#
#   tools/setup.sh [build] [clang]     build: compiler, libraries, .venv;  clang: also sanitizers, fuzzing, lint
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ cmake ninja-build pkg-config libhwy-dev libgtest-dev libbenchmark-dev libpng-dev libsndfile1-dev
  libcli11-dev libspdlog-dev nlohmann-json3-dev python3-venv)
clang_packages=(clang-19 clang-tidy-19 clang-format-19 libclang-rt-19-dev libomp-19-dev llvm-19)
for what in "$@"; do
  case "$what" in
    build) ;;
    clang) packages+=("${clang_packages[@]}") ;;
    *) echo "setup.sh: argument is $what; allowed: build, clang" >&2; exit 2 ;;
  esac
done

install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    echo "setup: not a Debian system; if the build stops, install the equivalents of: ${packages[*]}" >&2
    return
  fi
  local package missing=()
  for package in "${packages[@]}"; do
    [[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
  if [[ $EUID -ne 0 ]]; then
    if ! command -v sudo >/dev/null; then
      echo "setup: packages are missing and this is not root: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    apt=(sudo "${apt[@]}")
  fi
  echo "setup: installing ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } </dev/null >"$log" 2>&1
  then
    cat "$log" >&2
    echo "setup: apt-get could not install: ${missing[*]}" >&2
    exit 1
  fi
  rm -f "$log"
}

make_venv() {
  local stamp=.venv/requirements.txt
  cmp -s tools/requirements.txt "$stamp" && [[ -x .venv/bin/python ]] && return
  echo "setup: Python tools in .venv"
  [[ -x .venv/bin/python ]] || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt
  cp tools/requirements.txt "$stamp"  # last: an interrupted install is done again
}

install_packages
make_venv
