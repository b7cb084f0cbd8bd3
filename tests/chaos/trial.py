"""One migration that something happens to, from a fresh guest to what has become of it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chaos_cells import Cell, Place, Stage, Step, Who
from chaos_hosts import Host, Pair
from held_guest import HeldGuest
from holds import Hold
from patience import started

from pageferry.errors import FerryError
from pageferry.v1 import migration_pb2 as pb

AWAY_SECONDS = 1.0
"""How long a wire is cut or a black hole."""
PUSH_BYTES_PER_SECOND = 6 << 20
MEMORY_MIB = 8


@dataclass
class Trial:
    """A guest at the source, a VMM that waits at the destination, and a name for the whole."""

    pair: Pair
    name: str
    guest: HeldGuest
    waiting: HeldGuest
    guest_id: str
    directory: Path
    backing: str
    migration_id: str = ""
    guests: list[HeldGuest] = field(default_factory=list)
    """Whom to end in the end."""
    told: list[str] = field(default_factory=list)
    """What was done, in order."""
    driver: str = "vmm"

    @classmethod
    async def begin(
        cls, pair: Pair, directory: Path, name: str, backing: str = "anonymous", memory: int = MEMORY_MIB
    ) -> Trial:
        """Start and register both; `memory` is the guest's, in MiB."""
        guest_id = f"g{uuid.uuid4().hex[:10]}"
        seed = str(zlib.crc32(name.encode()))
        options = ("--seed", seed, "--backing", backing)
        path = directory / guest_id
        guest = await started(partial(HeldGuest, path.with_suffix(".a"), *options, memory=memory))
        try:
            waiting = await started(partial(HeldGuest, path.with_suffix(".b"), "--incoming", *options, memory=memory))
        except BaseException:
            guest.close()
            raise
        made = [guest, waiting]
        trial = cls(pair, name, *made, guest_id, directory, backing, guests=made)
        try:
            await pair.source.client.register_guest(guest_id, trial.guest.socket_path)
            await pair.destination.client.register_guest(guest_id, trial.waiting.socket_path)
        except BaseException:
            await trial.end()
            raise
        return trial

    async def start(self, **limits: Any) -> None:
        """Start the migration."""
        found = await self.pair.source.client.start_migration(
            self.guest_id,
            self.pair.incoming,
            request_id=uuid.uuid4().hex,
            limits=pb.Limits(**{"push_bytes_per_second": PUSH_BYTES_PER_SECOND, **limits}),
        )
        self.migration_id = found.migration_id

    async def end(self) -> None:
        """End what still runs, and have it forgotten."""
        self.pair.wire.clear()
        for guest in self.guests:
            await asyncio.to_thread(guest.close)
        for host in self.pair.hosts:
            await host.forget(self.guest_id)

    async def another_vmm(self) -> None:
        """Have a fresh VMM wait at the destination, in place of one that is no use any more."""
        seed = str(zlib.crc32(self.name.encode()))
        await asyncio.to_thread(self.waiting.close)
        path = self.directory / f"{self.guest_id}.{len(self.guests)}"
        backing = ("--seed", seed, "--backing", self.backing)
        self.waiting = await started(partial(HeldGuest, path, "--incoming", *backing, memory=MEMORY_MIB))
        self.guests.append(self.waiting)
        await self.pair.destination.forget(self.guest_id)
        await self.pair.destination.client.register_guest(self.guest_id, self.waiting.socket_path)

    def hold(self, step: Step, seconds: float = 10.0) -> Hold:
        """Have the migration held at a step; `seconds` is how long it may take until it comes there."""
        if step.place is Place.WIRE:
            if step.lanes_over_grpc:
                self.pair.wire.lanes.refuses = True
            return self.pair.wire.hold(step.call, step.phase, step.nth, seconds)
        return (self.guest if step.place is Place.SOURCE_VMM else self.waiting).hold(step.call, step.phase, seconds)

    async def hurry(self) -> None:
        """Let the rest come as fast as it can."""
        with contextlib.suppress(FerryError):
            await self.pair.source.client.set_limits(self.migration_id, pb.Limits())

    # What may happen

    async def strike(self, cell: Cell, hold: Hold) -> None:
        """Have it happen while the step is held, and let the step go on or be lost as the cell says."""
        who = cell.who
        self.told.append(f"{who} at {cell.step.name}")
        if who.at_source or who.at_destination:
            await self._end_sidecars(cell, hold)
        elif who in (Who.CUT, Who.BLACK_HOLE):
            await self._break_wire(cell, hold)
        else:
            await (self.waiting if who is Who.DESTINATION_VMM else self.guest).kill_now()
            hold.release(deliver=cell.deliver)

    async def _end_sidecars(self, cell: Cell, hold: Hold) -> None:
        ends = [host for host, is_it in self._victims(cell.who) if is_it]
        if cell.who.told:
            await asyncio.gather(*(host.told_to_end() for host in ends))
            hold.release(deliver=cell.deliver)
            await asyncio.gather(*(host.ends() for host in ends))
        else:
            await asyncio.gather(*(host.kill() for host in ends))
        # What is under way arrives where it can: when who is to have it is away, at who comes after it.
        to_who_ended = (cell.who.at_source and cell.step.to_source) or (
            cell.who.at_destination and cell.step.to_destination
        )
        if not (cell.late or (to_who_ended and cell.deliver)):
            hold.release(deliver=cell.deliver)
        await asyncio.gather(*(self._start_again(host) for host in ends))
        hold.release(deliver=cell.deliver)

    def _victims(self, who: Who) -> tuple[tuple[Host, bool], ...]:
        return (self.pair.source, who.at_source), (self.pair.destination, who.at_destination)

    async def _start_again(self, host: Host) -> None:
        await host.start()
        # As whoever runs the hosts does, since the sidecar has forgotten what it was only told.
        guest = self.guest if host is self.pair.source else self.waiting
        if guest.alive and not await self._listed(host):
            await host.register(self.guest_id, guest.socket_path, self.driver)

    async def _listed(self, host: Host) -> bool:
        return any(guest.guest_id == self.guest_id for guest in await host.client.list_guests())

    async def _break_wire(self, cell: Cell, hold: Hold) -> None:
        wire = self.pair.wire
        (wire.cut if cell.who is Who.CUT else wire.stall)()
        hold.release(deliver=cell.deliver)
        await asyncio.sleep(AWAY_SECONDS)
        wire.heal()


async def eventually(look: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Look again and again until it is so; return whether it was in time."""
    try:
        async with asyncio.timeout(seconds):
            while not await look():  # noqa: ASYNC110 - what other processes do
                await asyncio.sleep(0.05)
    except TimeoutError:
        return False
    return True


async def run_cell(pair: Pair, directory: Path, cell: Cell, judge: Callable[[Trial, Cell], Awaitable[Any]]) -> Any:
    """Have a cell's failure happen to a fresh guest; return what `judge` finds."""
    backing = "shmem" if cell.who is Who.SOURCE_VMM_SHARED else "anonymous"
    trial = await Trial.begin(pair, directory, cell.name, backing)
    try:
        hold = trial.hold(cell.step)
        await trial.start()
        await hold.reached()
        await trial.strike(cell, hold)
        if cell.step.stage >= Stage.AFTER:
            await trial.hurry()
        return await judge(trial, cell)
    finally:
        await trial.end()
