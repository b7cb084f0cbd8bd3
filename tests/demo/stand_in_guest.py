"""A guest for the demonstration that counts, until a file beside its socket tells it to go or to come."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path

WRONG = os.environ.get("STAND_IN", "")
arguments = sys.argv[1:]
incoming = "--incoming" in arguments
told = Path(arguments[arguments.index("--socket") + 1] + ".go")
pages = int(arguments[arguments.index("--memory") + 1]) // 4096
steps = 0 if incoming else 100


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


if WRONG == "guest" and not incoming:
    print("no memory for this guest", file=sys.stderr)
    sys.exit(2)
say("ready", pid=os.getpid())
while True:
    readable, _, _ = select.select([0], [], [], 0.02)
    if readable:
        word = sys.stdin.readline().strip()
        if not word:
            break
        bad = 3 if WRONG == "memory" else 0
        say("verified", pages=pages, bad=bad, first_bad=["page 7: is zero"] * bool(bad))
    running = not incoming or told.exists()
    if told.exists() and not incoming and WRONG != "source stays":
        break
    steps += (200 if incoming and steps == 0 else 1) * running
    say("progress", steps=steps, errors=int(WRONG == "errors" and incoming), state="running" if running else "incoming")
    time.sleep(0.01)
