#!/usr/bin/env bash
# Run promtool with the given arguments; where there is none, say what was skipped.
set -euo pipefail
PATH="$(dirname "$0")/../.make/bin:$PATH"
if command -v promtool >/dev/null; then
    exec promtool "$@"
fi
echo "skipped: promtool $* (promtool is in the Debian package prometheus)"
