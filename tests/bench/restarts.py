"""What a guest waits when its memory is on the way and a sidecar is killed and started again, or the wire is cut.

`--json` prints one JSON object as the last line; docs/benchmarks.md explains its keys. Needs what faults.py needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "chaos"), str(TESTS / "end_to_end")]

from chaos_hosts import Host, Pair  # noqa: E402 - found by the paths above
from trial import Trial, eventually  # noqa: E402

MEMORY_MIB = 96
SETTLED_SECONDS = 0.3
CUT_SECONDS = 1.0
LONGEST_SECONDS = 30.0
Figures = dict[str, float]


async def goes_on(trial: Trial) -> float:
    """Return the time at which the guest has got another page."""
    before = await trial.waiting.steps()
    while await trial.waiting.steps() == before:  # noqa: ASYNC110 - what another process does
        await asyncio.sleep(0.002)
    return time.monotonic()


async def stands_still(trial: Trial) -> None:
    """Wait until the guest waits for a page."""
    before = -1
    while (now := await trial.waiting.steps()) != before:
        before = now
        await asyncio.sleep(0.05)


async def restart(trial: Trial, host: Host) -> Figures:
    """Kill a sidecar, and start it again once the guest waits."""
    await host.kill()
    await stands_still(trial)
    begun = time.monotonic()
    going = asyncio.create_task(goes_on(trial))
    await host.start()
    ready = time.monotonic()
    answered = await going
    return {"from_start_ms": (answered - begun) * 1e3, "from_ready_ms": (answered - ready) * 1e3}


async def cut(trial: Trial) -> Figures:
    """Cut every connection between the hosts for a second."""
    trial.pair.wire.cut()
    begun = time.monotonic()
    await stands_still(trial)
    going = asyncio.create_task(goes_on(trial))
    await asyncio.sleep(CUT_SECONDS - (time.monotonic() - begun))
    trial.pair.wire.heal()
    answered = await going
    return {"waited_ms": (answered - begun) * 1e3}


async def _runs(trial: Trial) -> bool:
    return await trial.waiting.state() == "running"


async def _idle(pair: Pair) -> bool:
    return not any([await host.active() for host in pair.hosts])


async def one(pair: Pair, directory: Path, name: str, disturb: Callable[[Trial], Awaitable[Figures]]) -> Figures:
    """Disturb one guest that runs at its destination, gets pages as it touches them, and lacks most of them."""
    trial = await Trial.begin(pair, directory, name, memory=MEMORY_MIB)
    try:
        async with asyncio.timeout(LONGEST_SECONDS):
            await trial.start(push_disabled=True)
            await eventually(partial(_runs, trial), LONGEST_SECONDS)
            await goes_on(trial)
            await asyncio.sleep(SETTLED_SECONDS)
            figures = await disturb(trial)
            await trial.hurry()
            await trial.waiting.is_intact()
            await eventually(partial(_idle, pair), LONGEST_SECONDS)
        return figures
    finally:
        await trial.end()


async def measure(rounds: int) -> dict[str, Any]:
    """Disturb each in turn, round after round."""
    found: dict[str, list[Figures]] = {"destination": [], "source": [], "cut": []}
    with tempfile.TemporaryDirectory(prefix="ferry-") as name:
        directory = Path(name)
        async with Pair(directory, 0, limits={}) as pair:
            kinds: dict[str, Callable[[Trial], Awaitable[Figures]]] = {
                "destination": lambda trial: restart(trial, pair.destination),
                "source": lambda trial: restart(trial, pair.source),
                "cut": cut,
            }
            for number in range(rounds):
                for kind, disturb in kinds.items():
                    found[kind].append(await one(pair, directory, f"{kind}-{number}", disturb))
    return {
        kind: {
            key: {"median": round(statistics.median(values), 1), "max": round(max(values), 1)}
            for key in figures[0]
            for values in [[one[key] for one in figures]]
        }
        for kind, figures in found.items()
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures for a person."""
    what = {
        "from_start_ms": "from the start of the {}'s new sidecar to the first page that the guest gets",
        "from_ready_ms": "the same, from when that sidecar says that it is ready",
        "waited_ms": "that a guest waits for a page when the wire is {} for a second",
    }
    rows = [
        (kind, f"{numbers['median']:.0f} ms", f"{numbers['max']:.0f} ms", what[key].format(kind))
        for kind, figures in result.items()
        for key, numbers in figures.items()
    ]
    head = ("", "median", "most", "")
    return "\n".join(
        f"{kind:<12}{median:>10}{most:>10}   {text}".rstrip() for kind, median, most, text in (head, *rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is done")
    options = parser.parse_args()
    result = asyncio.run(measure(options.rounds))
    print(table(result))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
