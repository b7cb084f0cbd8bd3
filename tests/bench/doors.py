"""The two doors for faults side by side: userfaultfd, and exits that a VMM forwards; same source, same guest, one run.

`--json` prints one JSON object as the last line; docs/benchmarks.md explains its keys. Needs root (or what `pageferry
preflight` asks for), a userfaultfd, and about 1 GiB of free memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import SECONDS, Crossing, Guest, stages, summary
from vcpus import LIBRARY, build

from pageferry.client import ended
from pageferry.demo.scene import Scene, together
from pageferry.demo.sidecars import Sidecar, start_sidecar
from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

GUEST = str(Path(__file__).with_name("door_guest.py"))
DOORS = ("uffd", "exit", "forwarder", "grpc")
"""The exit door is there three times: native threads, and Python's over the hand-off's connection and FaultService."""
THREADS = (1, 2, 4, 8)
ALONE = pb.Limits(push_disabled=True)
PAGE = 4096
GIB = 1 << 30
WARM_UP = 100
SPARSE = 64
"""Of the memory that is said to consist of 1 GiB pages, one page in so many is written."""


@dataclass(frozen=True)
class Memory:
    """A guest's memory and its door: MiB, page size in bytes, and how many pages there are to one that is written."""

    door: str
    mib: int
    page_size: int = PAGE
    every: int = 1


@dataclass
class Tally:
    """Faults of one door with one number of threads, over all rounds."""

    us: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        return summary(self.us) | {"faults_s": round(len(self.us) / self.seconds, 1)}


class DoorGuest(Guest):
    """A door_guest process."""

    @classmethod
    async def open(cls, scene: Scene, name: str, memory: Memory, *, incoming: bool) -> DoorGuest:
        socket = scene.directory / f"{name}.sock"
        options = {
            "--socket": socket,
            "--door": memory.door,
            "--memory": memory.mib,
            "--library": scene.directory / LIBRARY,
            "--page-size": memory.page_size,
            "--every": memory.every,
        }
        arguments = [GUEST, *(str(word) for option in options.items() for word in option)]
        events: list[dict[str, Any]] = []
        child = await scene.spawn_python(
            name,
            [*arguments, "--incoming"] if incoming else arguments,
            lambda line: events.append(json.loads(line)),
            heard="stdout",
            gone=Reason.VMM_GONE,
        )
        guest = cls(child, socket)
        guest.events = events
        await child.until(lambda: bool(events), SECONDS, "its memory")
        return guest

    async def fault(self, count: int, threads: int, tally: Tally | None = None) -> None:
        """Touch missing pages from some threads at once."""
        seen = len(self.events)
        await self.child.say(f"touch {count} {threads}")
        await self.child.until(lambda: len(self.events) > seen, SECONDS, "the touches")
        if tally is not None:
            tally.us += self.events[-1]["us"]
            tally.seconds += self.events[-1]["seconds"]

    def page_tables_kib(self) -> int:
        """Return VmPTE: the memory that this process' page tables take."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmPTE")).split()[1])


class DoorCrossing(Crossing):
    """One migration of a fresh guest, without push until `push` allows it."""

    def __init__(self, scene: Scene, ends: tuple[Sidecar, Sidecar], name: str, memory: Memory) -> None:
        super().__init__(*ends, name, memory.mib)
        self._scene = scene
        self._what = memory
        self.guest: DoorGuest
        self.migration_id = ""

    async def begin(self) -> DoorCrossing:
        """Move the guest, and touch some pages so that all that is done once is done."""
        name = self._name
        leaving, self.guest = await together(
            DoorGuest.open(self._scene, f"{name}-a", self._what, incoming=False),
            DoorGuest.open(self._scene, f"{name}-b", self._what, incoming=True),
        )
        async with self._source.client() as source, self._destination.client() as destination:
            await source.register_guest(name, str(leaving.socket))
            await destination.register_guest(name, str(self.guest.socket))
            migration = await source.start_migration(
                name, self._destination.address, request_id=str(uuid.uuid4()), limits=ALONE
            )
            self.migration_id = migration.migration_id
            async with aclosing(source.watch_migration(self.migration_id)) as looks:
                async for look in looks:
                    if ended(look):
                        sys.exit(f"the guest did not move: {look.error.message}")
                    if look.HasField("downtime"):
                        break
        await self.guest.fault(WARM_UP, 1)
        return self

    async def stages(self) -> dict[str, dict[str, float]]:
        return stages(await self.look(self.migration_id))

    async def push(self) -> None:
        await self.limit(self.migration_id, pb.Limits())

    async def push_and_finish(self) -> int:
        await self.push()
        return await self.finish()

    async def finish(self) -> int:
        """Wait for the rest, once push is allowed; return the KiB of page tables at the destination at the end."""
        await self.end(self.migration_id)
        # The source is done before the destination has put small mappings together.
        async with self._destination.client() as client, aclosing(client.watch_migration(self.migration_id)) as looks:
            async for _ in looks:
                pass
        used = self.guest.page_tables_kib()
        await self.guest.child.end()
        return used


class Bench:
    """Both sidecars, and how often to do what."""

    def __init__(self, scene: Scene, ends: tuple[Sidecar, Sidecar], options: argparse.Namespace) -> None:
        self._scene = scene
        self._ends = ends
        self._options = options

    async def cross(self, name: str, memory: Memory) -> DoorCrossing:
        return await DoorCrossing(self._scene, self._ends, name, memory).begin()

    async def unpushed(self) -> dict[str, Any]:
        """Fault without push, door by door in turn, so that what disturbs the machine disturbs both alike."""
        options = self._options
        crossings = {door: await self.cross(f"{door}-alone", Memory(door, options.memory)) for door in DOORS}
        by_stage: dict[str, Any] = {}
        tallies = tallies_of_all()
        for threads in THREADS:
            for _ in range(options.rounds):
                for door, crossing in crossings.items():
                    await crossing.guest.fault(options.touches, threads, tallies[door][threads])
            if threads == 1:
                by_stage = {door: await crossing.stages() for door, crossing in crossings.items()}
        return {
            "doors": figures(tallies),
            "stages_us": by_stage,
            "vmpte_small_kib": {door: crossing.guest.page_tables_kib() for door, crossing in crossings.items()},
            "vmpte_kib": {door: await crossing.push_and_finish() for door, crossing in crossings.items()},
        }

    async def pushed(self) -> dict[str, Any]:
        """Fault while push fills the same memory, which ends it: a fresh guest each time."""
        options = self._options
        tallies = tallies_of_all()
        for threads in THREADS:
            for turn in range(options.pushed_rounds):
                for door in DOORS:
                    crossing = await self.cross(f"{door}-{threads}-{turn}", Memory(door, options.memory))
                    await crossing.push()
                    await crossing.guest.fault(options.pushed_touches, threads, tallies[door][threads])
                    await crossing.finish()
        return {"doors_pushed": figures(tallies)}

    async def big_pages(self) -> dict[str, Any]:
        """Fault behind the exit door on memory that is said to consist of pages of 1 GiB, and of 4 KiB."""
        options = self._options
        sizes = (GIB, PAGE)
        tallies = {size: Tally() for size in sizes}
        crossings = {
            size: await self.cross(f"exit-{size >> 12}", Memory("exit", GIB >> 20, size, SPARSE)) for size in sizes
        }
        for _ in range(options.rounds):
            for size, crossing in crossings.items():
                await crossing.guest.fault(options.touches // 2, 1, tallies[size])
        for crossing in crossings.values():
            await crossing.push_and_finish()
        big, small = (summary(tallies[size].us) for size in sizes)
        return {"big_page_us": big, "small_page_us": small, "big_page_ratio": round(big["p50"] / small["p50"], 3)}


def tallies_of_all() -> dict[str, dict[int, Tally]]:
    return {door: {threads: Tally() for threads in THREADS} for door in DOORS}


def figures(tallies: dict[str, dict[int, Tally]]) -> dict[str, Any]:
    return {door: {str(threads): one.figures() for threads, one in by.items()} for door, by in tallies.items()}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything, and return the figures."""
    async with Scene() as scene:
        build(scene.directory)
        bench = Bench(scene, await together(start_sidecar(scene, "alpha"), start_sidecar(scene, "beta")), options)
        result = await bench.unpushed() | await bench.pushed() | await bench.big_pages()
    doors = result["doors"]
    ratios = {
        door: {
            "p50_1": round(doors[door]["1"]["p50"] / doors["uffd"]["1"]["p50"], 3),
            "faults_8": round(doors[door]["8"]["faults_s"] / doors["uffd"]["8"]["faults_s"], 3),
        }
        for door in DOORS[1:]
    }
    return {
        "memory_mib": options.memory,
        "ratio_p50_1": ratios["exit"]["p50_1"],
        "ratio_faults_8": ratios["exit"]["faults_8"],
        **{f"{door}_ratio_{what}": ratio for door in DOORS[2:] for what, ratio in ratios[door].items()},
        **result,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures for a person."""
    columns = ("mean", "p50", "p90", "p99", "faults_s")
    lines = [f"{'':<22}" + "".join(f"{name:>10}" for name in columns)]
    for title, key in (("", "doors"), (", push", "doors_pushed")):
        for threads in THREADS:
            for door in DOORS:
                row = result[key][door][str(threads)]
                name = f"{door} {threads} thread{'s' * (threads > 1)}{title}"
                lines.append(f"{name:<22}" + "".join(f"{row[column]:>10.0f}" for column in columns))
    for door in DOORS:
        means = ", ".join(f"{stage} {one['mean']:.0f}" for stage, one in result["stages_us"][door].items())
        lines.append(f"{door} at one thread, mean us: {means}")
        small, end = (result[key][door] for key in ("vmpte_small_kib", "vmpte_kib"))
        lines.append(f"{door} page tables: {small} KiB while faults come, {end} KiB at the end")
    for door in DOORS[1:]:
        prefix = "" if door == "exit" else f"{door}_"
        p50, faults = (result[f"{prefix}ratio_{what}"] for what in ("p50_1", "faults_8"))
        lines.append(f"{door} / uffd: p50 at one thread {p50}, faults a second at 8 {faults}")
    lines.append(f"1 GiB pages / 4 KiB pages behind the exit door: p50 {result['big_page_ratio']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--memory", type=int, default=128, help="MiB of each guest")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each door, without push")
    parser.add_argument("--touches", type=int, default=400, help="faults in a turn")
    parser.add_argument("--pushed-rounds", type=int, default=2, help="guests for each door and number of threads")
    parser.add_argument("--pushed-touches", type=int, default=600, help="most faults of each, under push")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    print(table(result))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
