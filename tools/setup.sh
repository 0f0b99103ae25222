#!/usr/bin/env bash
# Installs what is missing and nothing else, so that calling it again costs nothing: Debian packages, then the Python
# tools of tools/requirements*.txt in .venv.
#
#   tools/setup.sh [build] [clang] [torch]     build: compiler, libraries, .venv;  clang: also sanitizers, fuzzing, lint;
#                                              torch: also PyTorch and what its package's tests need
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ cmake ninja-build pkg-config libhwy-dev libgtest-dev libbenchmark-dev libpng-dev libsndfile1-dev
  libcli11-dev libspdlog-dev nlohmann-json3-dev python3-venv)
clang_packages=(clang-19 clang-tidy-19 clang-format-19 libclang-rt-19-dev libomp-19-dev llvm-19)
requirements=(requirements.txt)
for what in "$@"; do
  case "$what" in
    build) ;;
    clang) packages+=("${clang_packages[@]}") ;;
    torch) requirements+=(requirements-torch.txt) ;;
    *) echo "setup.sh: argument is $what; allowed: build, clang, torch" >&2; exit 2 ;;
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

# Each file of requirements leaves a copy in .venv when it is installed.
make_venv() {
  local file
  [[ -x .venv/bin/python ]] || python3 -m venv .venv
  for file in "${requirements[@]}"; do
    cmp -s "tools/$file" ".venv/$file" && continue
    echo "setup: Python tools of tools/$file in .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "tools/$file"
    cp "tools/$file" ".venv/$file"  # last: an interrupted install is done again
  done
}

install_packages
make_venv
