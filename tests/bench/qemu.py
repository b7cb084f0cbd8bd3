"""One Linux guest that works, moved by QEMU's own post-copy, without and with preempt, and by pageferry, in turns.

`--json` prints one JSON object as the last line; docs/benchmarks.md explains its keys. Needs root, a userfaultfd, what
the tests that move a QEMU guest need, and four times the guest's memory. A second QEMU, such as tools/newer_qemu.sh
unpacks, is measured in the same way where it is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qemu_ends import Ends, Figures, Moved, measured
from qemu_ferry import Ferry
from qemu_own import move_by_itself

from pageferry.demo.scene import Scene, together
from pageferry.demo.sidecars import start_sidecar
from qemu_guest.guest import Machine
from qemu_guest.image import QEMU, what_is_missing

NEWER = Path(__file__).resolve().parents[2] / ".make/qemu-newer" / QEMU
ROUND_SECONDS = 400.0


@dataclass(frozen=True)
class Way:
    """One way to move the guest with one QEMU; `name` is its key."""

    name: str
    binary: str
    move: Callable[[Ends], Awaitable[Moved]]


def ways_of(ferry: Ferry, binary: str, suffix: str) -> list[Way]:
    return [
        Way(f"qemu{suffix}", binary, partial(move_by_itself, preempt=False)),
        Way(f"qemu{suffix}_preempt", binary, partial(move_by_itself, preempt=True)),
        Way(f"pageferry{suffix}", binary, ferry.move),
    ]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all ways, the rounds' turns beginning with another one each; return the figures."""
    machine = Machine(memory_mib=options.memory, vcpus=options.vcpus)
    versions: dict[str, str] = {}
    rounds: dict[str, list[Figures]] = {}
    async with Scene() as scene:
        ferry = Ferry(*await together(start_sidecar(scene, "alpha"), start_sidecar(scene, "beta")))
        ways = ways_of(ferry, QEMU, "")
        if options.newer:
            ways += ways_of(ferry, options.newer, "_newer")
        for number in range(options.rounds):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                async with asyncio.timeout(ROUND_SECONDS), Ends(machine, way.binary, scene.directory) as ends:
                    versions.setdefault(way.binary, await ends.version())
                    figures = await measured(ends, way.move)
                rounds.setdefault(way.name, []).append(figures)
                if options.each:
                    print(row(f"{number + 1} {way.name}", asdict(figures)), flush=True)
    result: dict[str, Any] = {way.name: middle(rounds[way.name]) for way in ways}
    result["ratios"] = ratios(result, "")
    if options.newer:
        result["ratios_newer"] = ratios(result, "_newer")
    return result | {"ran_on": ran_on(options, versions)}


def middle(rounds: list[Figures]) -> dict[str, float]:
    """Return each figure's median; of bad pages the sum, for one is too many."""
    result = {name: statistics.median(asdict(one)[name] for one in rounds) for name in asdict(rounds[0])}
    return result | {"bad_pages": sum(one.bad_pages for one in rounds)}


def ratios(result: dict[str, Any], suffix: str) -> dict[str, float | None]:
    """Compare pageferry with QEMU's own post-copy of the same run."""
    ferry, own, preempt = (result[name] for name in (f"pageferry{suffix}", f"qemu{suffix}", f"qemu{suffix}_preempt"))
    return {
        "downtime_ms_more": round(ferry["downtime_ms"] - own["downtime_ms"], 1),
        "gaps_over_10ms_more": ferry["gaps_over_10ms"] - preempt["gaps_over_10ms"],
        "gap_us_p99": ratio(ferry["gap_us_p99"], preempt["gap_us_p99"]),
        "total_ms": ratio(ferry["total_ms"], own["total_ms"]),
    }


def ratio(value: float, base: float) -> float | None:
    """Return None where the guest saw no gap to compare with."""
    return round(value / base, 3) if base else None


def ran_on(options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "memory_mib": memory >> 20,
        "qemu": versions[QEMU],
        "qemu_newer": versions.get(options.newer),
        "guest_memory_mib": options.memory,
        "guest_vcpus": options.vcpus,
        "rounds": options.rounds,
        "load": [round(load, 2) for load in os.getloadavg()],
    }


COLUMNS = {
    "downtime_ms": ("downtime ms", ".1f"),
    "gap_us_p50": ("gap p50 us", ".0f"),
    "gap_us_p99": ("gap p99 us", ".0f"),
    "gap_ms_max": ("longest ms", ".1f"),
    "gaps_over_10ms": ("> 10 ms", "g"),
    "stall_ms": ("stalled ms", ".0f"),
    "total_ms": ("total ms", ".0f"),
    "bytes": ("bytes", ".0f"),
    "bad_pages": ("bad pages", "g"),
}


def row(name: str, figures: dict[str, float]) -> str:
    cells = (f"{figures[key]:>{max(len(heading), 9) + 2}{shape}}" for key, (heading, shape) in COLUMNS.items())
    return f"{name:<22}" + "".join(cells)


def table(result: dict[str, Any]) -> str:
    """Return the figures for a person."""
    lines = [" " * 22 + "".join(f"{heading:>{max(len(heading), 9) + 2}}" for heading, _ in COLUMNS.values())]
    lines += [row(name, figures) for name, figures in result.items() if "bad_pages" in figures]
    for key in ("ratios", "ratios_newer"):
        if found := result.get(key):
            lines.append(
                f"{key}: downtime {found['downtime_ms_more']:+} ms beside qemu (aim: at most 20), gaps over 10 ms "
                f"{found['gaps_over_10ms_more']:+} beside qemu_preempt (below 0), their p99 {found['gap_us_p99']} "
                f"of its (below 1), total {found['total_ms']} of qemu's (at most 2)"
            )
    return "\n".join([*lines, f"ran on: {result['ran_on']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--each", action="store_true", help="print each round as it ends")
    parser.add_argument("--rounds", type=int, default=3, help="migrations of each way; figures are medians")
    parser.add_argument("--memory", type=int, default=512, help="MiB of the guest")
    parser.add_argument("--vcpus", type=int, default=1, help="vCPUs of the guest, each with a thread that works")
    parser.add_argument("--newer", default=str(NEWER), help="another QEMU to measure as well; '' for none")
    options = parser.parse_args()
    if (missing := what_is_missing()) is not None:
        sys.exit(missing)
    if options.newer and not os.access(options.newer, os.X_OK):
        print(f"only {QEMU} is measured: there is no {options.newer}, which tools/newer_qemu.sh would bring")
        options.newer = ""
    result = asyncio.run(measure(options))
    print(table(result))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
