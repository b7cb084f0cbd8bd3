#!/usr/bin/env bash
# Make .venv and install pageferry into it: tools/setup.sh runtime|dev. The stamp it leaves is the Makefile's target.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/python.sh

kind=$1
case $kind in
    runtime) what=. pins="constraints/runtime.txt" ;;
    dev) what=".[dev]" pins="constraints/runtime.txt constraints/dev.txt" ;;
    *) fail "usage: tools/setup.sh runtime|dev" ;;
esac

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    ensure_venv_module "$python"
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

echo "installing pageferry and what it needs to $kind (pinned in constraints/)"
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
# By environment and not by option, because pip passes these on to the installation of the build backend; which of the
# two variables counts there depends on pip's age.
if ! PIP_CONSTRAINT="$pins constraints/build.txt" PIP_BUILD_CONSTRAINT=constraints/build.txt \
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$what" >"$messages" 2>&1; then
    cat "$messages" >&2
    if grep -qE 'NewConnectionError|ConnectTimeout|name resolution|Network is unreachable|ProxyError' "$messages"; then
        fail "pip could not reach a package index: setting up needs the network, once."
    fi
    fail "pip failed; its message is above."
fi

touch .venv/runtime.stamp
[ "$kind" = runtime ] || touch .venv/dev.stamp
