"""What the pager core costs, in CPU time an operation: a fault from touch to install, a push, and scale.

`--json` prints one JSON object as the last line. `ratio` compares a sparse layout of 1 TiB with one of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.core.runs import RAW, Run

GIB = 1 << 30
TIB = 1 << 40
OPERATIONS = 20_000
ROUNDS = 7


def pager_of(size: int) -> Pager:
    return Pager(Layout([Region(0, size)]), PagerOptions(), 0.0)


def serve_fault(pager: Pager, page: int, now: float) -> None:
    """One page from touch to install, as a session does it."""
    pager.fault(page, now, now)
    while (runs := pager.next_fetch(now)) is not None:
        answer = [Run(first, pages, RAW) for first, pages in runs]
        pager.demand_arrived(answer, now)
        for run in answer:
            for first, pages in pager.wanted(run):
                pager.installed(Run(first, pages, RAW), Lane.DEMAND, now)


def serve_push(pager: Pager, now: float) -> int:
    """One push request from asking to install; returns its pages."""
    request = pager.next_push(now)
    if request is None:
        return 0
    runs = [Run(first, pages, RAW) for first, pages in request.runs]
    pager.push_arrived(runs, now, last=True)
    for run in runs:
        for first, pages in pager.wanted(run):
            pager.installed(Run(first, pages, RAW), Lane.PUSH, now)
    return sum(run.pages for run in runs)


def best(measure: Callable[[], float]) -> float:
    """The least of some rounds: what disturbs a measurement only ever adds to it."""
    return min(measure() for _ in range(ROUNDS))


def faults(size: int) -> float:
    """Nanoseconds a fault, where the touched pages lie spread over 1,024 places of the memory."""
    rng = random.Random(3)
    pager = pager_of(size)
    stride = size // PAGE_SIZE // 1024
    pages = list(dict.fromkeys(rng.randrange(1024) * stride + rng.randrange(200) for _ in range(OPERATIONS)))
    begun = time.process_time_ns()
    for at, page in enumerate(pages):
        serve_fault(pager, page, float(at))
    return (time.process_time_ns() - begun) / len(pages)


def mixed(size: int) -> float:
    """Nanoseconds an operation, where pushes and faults take turns."""
    rng = random.Random(4)
    pager = pager_of(size)
    stride = size // PAGE_SIZE // 64
    begun = time.process_time_ns()
    for at in range(OPERATIONS // 8):
        serve_fault(pager, rng.randrange(64) * stride + rng.randrange(4000), float(at))
        serve_push(pager, float(at))
    return (time.process_time_ns() - begun) / (OPERATIONS // 4)


def push_request() -> float:
    """Nanoseconds a push request of 64 pages, with no fault in sight."""
    pager = pager_of(GIB)
    requests = 0
    begun = time.process_time_ns()
    while serve_push(pager, 0.0):
        requests += 1
    return (time.process_time_ns() - begun) / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    by_size = {size: best(lambda size=size: statistics.fmean((faults(size), mixed(size)))) for size in (GIB, TIB)}
    result = {
        "ns_per_op_1g": round(by_size[GIB]),
        "ns_per_op_1t": round(by_size[TIB]),
        "ratio": round(by_size[TIB] / by_size[GIB], 3),
        "ns_per_fault": round(best(lambda: faults(GIB))),
        "ns_per_push_of_64": round(best(push_request)),
    }
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write("".join(f"{key:>20} {value}\n" for key, value in result.items()))


if __name__ == "__main__":
    main()
