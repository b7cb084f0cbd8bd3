"""How 16 guests that come to one sidecar at once share its push, and what a fault costs while 15 others push.

`--json` prints one JSON object as the last line; docs/benchmarks.md explains its keys. Needs root (or what `pageferry
preflight` asks for), a userfaultfd, and about 3 GiB of free memory for the default of 48 MiB a guest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import uuid
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from faults import Guest, summary

from pageferry.client import SidecarClient, ended
from pageferry.demo.scene import Scene, together
from pageferry.demo.sidecars import start_sidecar
from pageferry.v1 import migration_pb2 as pb

POSTCOPY = pb.MIGRATION_STATE_POSTCOPY
WEIGHTS = (100, 200, 400)
HELD = {"push_disabled": True}
SECONDS = 50.0


@dataclass
class Mover:
    """One guest, and the migration that it is in."""

    name: str
    weight: int
    waiting: Guest
    migration_id: str = ""
    samples: list[int] = field(default_factory=list)
    """Bytes pushed, at each look at which every guest still had pages to come."""


class Pair:
    """A source sidecar, a destination sidecar, and guests between them."""

    def __init__(self, scene: Scene, source: SidecarClient, destination: SidecarClient, address: str) -> None:
        self._scene = scene
        self._source = source
        self._destination = destination
        self._address = address

    async def cross(self, name: str, weights: list[int], memory: int) -> list[Mover]:
        """Start guests and hand them over without push, so that all can be let go in one moment."""
        movers = await asyncio.gather(
            *(self._guest(f"{name}{number}", weight, memory) for number, weight in enumerate(weights))
        )
        await asyncio.gather(*(self._start(mover) for mover in movers))
        return list(movers)

    async def _guest(self, name: str, weight: int, memory: int) -> Mover:
        leaving, waiting = await together(
            Guest.start(self._scene, f"{name}-a", memory, incoming=False),
            Guest.start(self._scene, f"{name}-b", memory, incoming=True),
        )
        await self._source.register_guest(name, str(leaving.socket))
        await self._destination.register_guest(name, str(waiting.socket))
        return Mover(name, weight, waiting)

    async def _start(self, mover: Mover) -> None:
        migration = await self._source.start_migration(
            mover.name, self._address, request_id=uuid.uuid4().hex, limits=pb.Limits(**HELD)
        )
        mover.migration_id = migration.migration_id
        while (look := await self.look(mover)).state != POSTCOPY:
            if ended(look):
                sys.exit(f"{mover.name} ended as {pb.MigrationState.Name(look.state)}: {look.error.message}")
            await asyncio.sleep(0.02)

    async def look(self, mover: Mover) -> pb.Migration:
        return await self._source.get_migration(mover.migration_id)

    async def push(self, movers: list[Mover]) -> None:
        """Let them all push."""
        await asyncio.gather(
            *(self._source.set_limits(mover.migration_id, pb.Limits(push_weight=mover.weight)) for mover in movers)
        )

    async def sample(self, movers: list[Mover]) -> None:
        """Note what each guest got, at the destination, for as long as none of them has all."""
        ids = {mover.migration_id: mover for mover in movers}
        while True:
            looks = [one for one in await self._destination.list_migrations() if one.migration_id in ids]
            done = [one for one in looks if one.progress.pages_present == one.progress.pages_total]
            if len(looks) < len(movers) or done or any(one.state != POSTCOPY for one in looks):
                return
            for one in looks:
                ids[one.migration_id].samples.append(one.progress.push_bytes)
            await asyncio.sleep(0.01)

    async def finish(self, movers: list[Mover]) -> None:
        """Wait until all have arrived whole."""
        for mover in movers:
            async with aclosing(self._source.watch_migration(mover.migration_id)) as looks:
                async for look in looks:
                    last = look
            if last.state != pb.MIGRATION_STATE_COMPLETED:
                sys.exit(f"{mover.name} ended as {pb.MigrationState.Name(last.state)}: {last.error.message}")


def pushed(movers: list[Mover]) -> list[int]:
    """Return what each got between the first and the last common look."""
    if len(movers[0].samples) < 3:
        sys.exit("too few looks while all pushed: give more --memory")
    return [mover.samples[-1] - mover.samples[0] for mover in movers]


async def measure_equal(pair: Pair, options: argparse.Namespace) -> dict[str, Any]:
    """Let guests of one weight push."""
    movers = await pair.cross("equal", [0] * options.guests, options.memory)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(pair.push(movers), pair.sample(movers))
    await pair.finish(movers)
    seconds = asyncio.get_running_loop().time() - began
    got = pushed(movers)
    mean = statistics.fmean(got)
    shares = sorted(round(one / mean, 3) for one in got)
    return {
        "shares": shares,
        "largest_deviation": round(max(abs(one - 1) for one in shares), 3),
        "looks": len(movers[0].samples),
        "push_mb_s": round(options.guests * (options.memory << 20) / seconds / 1e6, 1),
    }


async def measure_weights(pair: Pair, options: argparse.Namespace) -> dict[str, Any]:
    """Let guests of three weights push."""
    weights = [WEIGHTS[number % len(WEIGHTS)] for number in range(options.guests)]
    movers = await pair.cross("weighed", weights, options.memory)
    await asyncio.gather(pair.push(movers), pair.sample(movers))
    await pair.finish(movers)
    got = pushed(movers)
    means = {
        weight: statistics.fmean(one for one, mover in zip(got, movers, strict=True) if mover.weight == weight)
        for weight in WEIGHTS
    }
    return {"weights": {str(weight): round(mean / means[WEIGHTS[0]], 2) for weight, mean in means.items()}}


async def measure_faults(pair: Pair, options: argparse.Namespace) -> dict[str, Any]:
    """Have a guest fault while nobody pushes, and while all others do."""
    (toucher,) = await pair.cross("touched", [0], options.memory)
    await toucher.waiting.touch(100, 0)
    alone = await toucher.waiting.touch(options.touches, 0)
    others = await pair.cross("pushed", [0] * (options.guests - 1), 2 * options.memory)
    await pair.push(others)
    among = []
    while not any(ended(one) for one in await asyncio.gather(*map(pair.look, others))):
        among += await toucher.waiting.touch(50, 0)
    await pair.push([toucher])
    await pair.finish([toucher, *others])
    return {"alone_us": summary(alone), "among_us": summary(among)}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything, and return the figures."""
    async with AsyncExitStack() as stack:
        scene = await stack.enter_async_context(Scene())
        source, destination = await together(start_sidecar(scene, "alpha"), start_sidecar(scene, "beta"))
        clients = [await stack.enter_async_context(sidecar.client()) for sidecar in (source, destination)]
        pair = Pair(scene, clients[0], clients[1], destination.address)
        result: dict[str, Any] = {"guests": options.guests, "memory_mib": options.memory}
        for part in (measure_equal, measure_weights, measure_faults):
            result |= await part(pair, options)
        return result


def table(result: dict[str, Any]) -> str:
    """Return the figures for a person."""
    shares, weights, alone, among = (result[name] for name in ("shares", "weights", "alone_us", "among_us"))
    others = result["guests"] - 1
    rows = [
        (
            "share",
            f"{shares[0]:.2f} - {shares[-1]:.2f}",
            f"of an equal one, {result['guests']} guests; at most {100 * result['largest_deviation']:.0f} % off",
        ),
        (
            "by weight",
            " : ".join(f"{one:.2f}" for one in weights.values()),
            f"push of guests with weights {' : '.join(weights)}",
        ),
        ("push", f"{result['push_mb_s']:.0f} MB/s", "of all together, from the call that allows it to the last page"),
        ("fault, alone", f"{alone['p50']:.0f} us", f"p50; p99 {alone['p99']} us"),
        (
            f"fault, {others} push",
            f"{among['p50']:.0f} us",
            f"p99 {among['p99']} us: {among['p99'] / alone['p99']:.1f} of alone ({among['count']} faults)",
        ),
    ]
    return "\n".join(f"{name:<16}{value:>18}   {what}" for name, value, what in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--guests", type=int, default=16, help="guests that push at once; at most 16")
    parser.add_argument("--memory", type=int, default=48, help="MiB of each guest")
    parser.add_argument("--touches", type=int, default=500, help="faults measured alone")
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measure(options), SECONDS))
    print(table(result))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
