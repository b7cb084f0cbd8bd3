#!/usr/bin/env bash
# Write constraints/*.txt again: the newest releases that pyproject.toml allows, every transitive dependency pinned.
# No index and no hash is recorded: where packages come from is the business of whoever installs.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/python.sh

python=$(find_python)
ensure_venv_module "$python"
mkdir -p constraints
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# freeze NAME REQUIREMENT...: what pip installs for the requirements into an empty environment, one pin a line.
freeze() {
    local venv=$scratch/$1
    shift
    "$python" -m venv "$venv"
    # Where Python itself brings setuptools, pip would keep that one and pin it nowhere.
    "$venv/bin/python" -m pip uninstall -qq -y --disable-pip-version-check setuptools wheel
    # Twice quiet: pip's warnings about the places it looks into are not about the pins.
    env -u PIP_CONSTRAINT "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"
    "$venv/bin/python" -m pip freeze --all --disable-pip-version-check --exclude pip --exclude pageferry --exclude-editable
}

# write NAME COMMENT: pins from stdin.
write() {
    { echo "# $2 Written by tools/pin.sh."; LC_ALL=C sort -f; } >"$scratch/$1.new"
    mv "$scratch/$1.new" "constraints/$1.txt"
    echo "constraints/$1.txt: $(grep -c == "constraints/$1.txt") pins"
}

build_backend=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
# An editable install needs one package more than the backend itself.
freeze build $build_backend editables | write build "What builds the wheel."
freeze runtime -e . | write runtime "What pageferry and pageferryd run with."
freeze dev -c constraints/runtime.txt -e '.[dev]' >"$scratch/all"
grep -vxFf constraints/runtime.txt "$scratch/all" | write dev "What tests and linters need on top of runtime.txt."
