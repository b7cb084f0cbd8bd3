"""End-to-end fault latency, push throughput, downtime and memory of two sidecars over loopback TCP, beside floors.

`--json` prints one JSON object as the last line; docs/benchmarks.md explains its keys. Needs root (or what `pageferry
preflight` asks for), a userfaultfd, and about 3 GiB of free memory for the default of 1 GiB a guest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

import floor

from pageferry.client import ended
from pageferry.demo.scene import Child, Scene, together
from pageferry.demo.sidecars import Sidecar, start_sidecar
from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

TOUCHER = str(Path(__file__).with_name("toucher.py"))
SECONDS = 120.0


class Guest:
    """A toucher process."""

    def __init__(self, child: Child, socket: Path) -> None:
        self.child = child
        self.socket = socket
        self.events: list[dict[str, Any]] = []

    @classmethod
    async def start(cls, scene: Scene, name: str, memory: int, *, incoming: bool) -> Guest:
        socket = scene.directory / f"{name}.sock"
        arguments = [TOUCHER, "--socket", str(socket), "--memory", str(memory), *(["--incoming"] if incoming else [])]
        events: list[dict[str, Any]] = []
        child = await scene.spawn_python(
            name, arguments, lambda line: events.append(json.loads(line)), heard="stdout", gone=Reason.VMM_GONE
        )
        guest = cls(child, socket)
        guest.events = events
        await child.until(lambda: bool(events), SECONDS, "its memory")
        return guest

    async def touch(self, count: int, pause_us: int) -> list[float]:
        seen = len(self.events)
        await self.child.say(f"touch {count} {pause_us}")
        await self.child.until(lambda: len(self.events) > seen, SECONDS, "the touches")
        taken: list[float] = self.events[-1]["us"]
        return taken


def summary(values: list[float]) -> dict[str, float]:
    """Return count, mean, p50, p90, p99 and max."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    numbers = {"mean": statistics.fmean(ordered), "max": ordered[-1]}
    numbers |= {f"p{share}": percentile(share / 100) for share in (50, 90, 99)}
    return {"count": len(ordered)} | {name: round(value, 1) for name, value in sorted(numbers.items())}


def stages(migration: pb.Migration) -> dict[str, dict[str, float]]:
    """Return the sidecar's own view: microseconds by stage."""
    return {
        entry.stage: {
            "mean": round(entry.latency.mean_us, 1),
            "p50": round(entry.latency.p50_us, 1),
            "p99": round(entry.latency.p99_us, 1),
        }
        for entry in migration.fault_latencies
    }


def peak_mib(sidecar: Sidecar) -> float:
    """Return the most memory that a sidecar has had resident (VmHWM)."""
    status = Path(f"/proc/{sidecar.child.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


class Crossing:
    """One migration of a fresh guest."""

    def __init__(self, source: Sidecar, destination: Sidecar, name: str, memory: int) -> None:
        self._source = source
        self._destination = destination
        self._name = name
        self._memory = memory

    async def start(self, scene: Scene, limits: pb.Limits) -> tuple[Guest, str]:
        """Start both ends and the migration; return the guest at the destination, running, and the migration's id."""
        leaving, waiting = await together(
            Guest.start(scene, f"{self._name}-a", self._memory, incoming=False),
            Guest.start(scene, f"{self._name}-b", self._memory, incoming=True),
        )
        async with self._source.client() as source, self._destination.client() as destination:
            await source.register_guest(self._name, str(leaving.socket))
            await destination.register_guest(self._name, str(waiting.socket))
            migration = await source.start_migration(
                self._name, self._destination.address, request_id=str(uuid.uuid4()), limits=limits
            )
            async with aclosing(source.watch_migration(migration.migration_id)) as looks:
                async for look in looks:
                    if look.HasField("downtime") or ended(look):
                        break
        return waiting, migration.migration_id

    async def limit(self, migration_id: str, limits: pb.Limits) -> None:
        async with self._source.client() as source:
            await source.set_limits(migration_id, limits)

    async def look(self, migration_id: str) -> pb.Migration:
        async with self._destination.client() as destination:
            return await destination.get_migration(migration_id)

    async def end(self, migration_id: str) -> pb.Migration:
        """Wait for the end; return the migration as the source knows it."""
        async with self._source.client() as source, aclosing(source.watch_migration(migration_id)) as looks:
            async for look in looks:
                last = look
        if last.state != pb.MIGRATION_STATE_COMPLETED:
            sys.exit(f"the migration ended as {pb.MigrationState.Name(last.state)}: {last.error.message}")
        return last


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything, and return the figures."""
    trips = floor.socket_round_trips(options.touches)
    faults = floor.local_userfaults(options.touches)
    return {
        "memory_mib": options.memory,
        "floor_us_p50": round(statistics.median(trips) + statistics.median(faults), 1),
        "floor": {"socket": summary(trips), "userfault": summary(faults)},
        **asyncio.run(measure_sidecars(options)),
        "socket_mb_s": round(floor.socket_throughput(options.memory << 20), 1),
    }


async def measure_sidecars(options: argparse.Namespace) -> dict[str, Any]:
    """Move two guests between two sidecars."""
    async with Scene() as scene:
        source, destination = await together(start_sidecar(scene, "alpha"), start_sidecar(scene, "beta"))
        result = await measure_faults(scene, Crossing(source, destination, "touched", options.memory), options)
        result |= await measure_push(scene, Crossing(source, destination, "quiet", options.memory))
        return result | {"rss_mib": {"source": peak_mib(source), "destination": peak_mib(destination)}}


async def measure_faults(scene: Scene, crossing: Crossing, options: argparse.Namespace) -> dict[str, Any]:
    """Touch without push, then under it."""
    guest, migration_id = await crossing.start(scene, pb.Limits(push_disabled=True))
    await guest.touch(100, 0)
    idle = await guest.touch(options.touches, 0)
    look = await crossing.look(migration_id)
    await crossing.limit(migration_id, pb.Limits())
    pushed = await guest.touch(options.touches, options.pause_us)
    last = await crossing.end(migration_id)
    return {
        "idle_us": summary(idle),
        "pushed_us": summary(pushed),
        "stages_us": stages(look),
        "touched_total_ms": round(last.postcopy_duration.ToTimedelta().total_seconds() * 1e3, 1),
    }


async def measure_push(scene: Scene, crossing: Crossing) -> dict[str, Any]:
    """Move a guest that touches nothing."""
    _, migration_id = await crossing.start(scene, pb.Limits())
    last = await crossing.end(migration_id)
    seconds = last.postcopy_duration.ToTimedelta().total_seconds()
    return {
        "push_mb_s": round(last.progress.push_bytes / seconds / 1e6, 1),
        "downtime_ms": round(last.downtime.ToTimedelta().total_seconds() * 1e3, 1),
        "total_ms": round(seconds * 1e3, 1),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures for a person, as ratios to their floors."""
    base, idle, pushed, rss = (result[name] for name in ("floor_us_p50", "idle_us", "pushed_us", "rss_mib"))
    share = result["push_mb_s"] / result["socket_mb_s"]
    rows = [
        ("floor", f"{base:.0f} us", "a bare socket's round trip and a local userfault, p50"),
        (
            "fault, no push",
            f"{idle['p50']:.0f} us",
            f"p50: {idle['p50'] / base:.2f} of the floor; p99 {idle['p99']} us",
        ),
        (
            "fault, push",
            f"{pushed['p50']:.0f} us",
            f"p50: {pushed['p50'] / base:.2f} of the floor; p99 {pushed['p99']} us",
        ),
        ("push", f"{result['push_mb_s']:.0f} MB/s", f"{share:.2f} of a bare socket's {result['socket_mb_s']} MB/s"),
        ("downtime", f"{result['downtime_ms']:.1f} ms", "from the call to pause until the destination runs"),
        (
            "last page after",
            f"{result['total_ms']:.0f} ms",
            f"{result['memory_mib']} MiB that the guest does not touch",
        ),
        (
            "peak memory",
            f"{rss['destination']:.0f} MiB",
            f"of the destination's sidecar; {rss['source']:.0f} at the source",
        ),
    ]
    return "\n".join(f"{name:<16}{value:>12}   {what}" for name, value, what in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--memory", type=int, default=1024, help="MiB of each guest")
    parser.add_argument("--touches", type=int, default=2000, help="faults measured in each part")
    parser.add_argument("--pause-us", type=int, default=500, help="pause between touches under push")
    options = parser.parse_args()
    result = measure(options)
    print(table(result))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
