"""Runs the keeper with a command of the test's: python keeper_host.py RUNTIME_DIR OPTIONS_AS_JSON."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from pageferryd.keeper.backoff import Backoff
from pageferryd.keeper.running import run

options = json.loads(sys.argv[2])
if options.pop("first_of_container", False):
    # What the first process of a pid namespace is without asking (prctl(2), PR_SET_CHILD_SUBREAPER).
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
pauses = Backoff(**options.pop("backoff", {}))
sys.exit(run([], Path(sys.argv[1]), **options, backoff=pauses))
