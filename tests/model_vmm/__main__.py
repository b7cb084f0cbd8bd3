"""Replay one seed with a trace, or run many."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

import structlog

from . import world
from .memory_file import FileWorld


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model_vmm", description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", help="the seed to replay")
    parser.add_argument("--seeds", type=int, help="run so many seeds, without a trace")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--file", action="store_true", help="a memory file and a bitmap instead of a userfaultfd")
    parser.add_argument("--deadline", type=float, default=world.DEADLINE, help="longest time of one, in seconds")
    arguments = parser.parse_args()
    kind = FileWorld if arguments.file else world.World
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if arguments.seeds is None:
        if arguments.seed is None:
            parser.error("give a seed, or --seeds")
        print(world.run(arguments.seed, print, deadline=arguments.deadline, kind=kind))
        return 0
    total: Counter[str] = Counter()
    failed = 0
    began = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            total += world.run(seed, deadline=arguments.deadline, kind=kind)
        except Exception as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
    print(f"{arguments.seeds} seeds, {failed} failed, {time.monotonic() - began:.0f} s: {dict(total)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
