"""How a stand-in is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMMAND = (sys.executable, "-m", "firecracker_vmm")


def environment() -> dict[str, str]:
    """Return an environment in which the stand-in is found, and its memory is by itself, as with musl."""
    tests = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": tests, "MALLOC_ARENA_MAX": "1"}
