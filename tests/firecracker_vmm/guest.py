"""The guest: a thread that checks and rewrites pages, and reads those that its balloon gave away as zeroes."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

from firecracker_vmm.memory import BOOT_MARK, LOW, MIB, PAGE, FirecrackerMemory, WorkArea, ranges_for
from pageferry.errors import FerryError, Reason
from pageferry.guests.control import GuestStatus, Verification
from pageferry.guests.pattern import HOLE_BLOCK
from pageferry.guests.process.plan import Order, Plan, Progress, pack_state, unpack_state
from pageferry.guests.process.worker import Worker

_FRAME = struct.Struct("<QQQQ")
_ZEROES = bytes(PAGE)
CHUNK = 64


@dataclass(frozen=True)
class Kind:
    """What is chosen before a microVM boots."""

    size: int
    page_size: int = PAGE
    guarded: bool = False
    seed: int = 7
    working_set: float = 0.5
    sparse: float = 0.25


class _Workload(Worker):
    """Also reads the balloon's pages, one a step."""

    def __init__(self, area: WorkArea, plan: Plan, progress: Progress, zeroed_from: int) -> None:
        super().__init__(area, plan, progress)
        self._area = area
        self.zeroed_from = zeroed_from

    def _step(self) -> None:
        super()._step()
        given = self._area.pages - self.zeroed_from
        if given:
            page = self.zeroed_from + self.steps * 7919 % given
            if self._area.read(page * PAGE, PAGE) != _ZEROES:
                self.errors += 1
                self._findings.append(f"page {page}: given away by the balloon, and not zero")


class Guest:
    """A microVM's guest over its memory."""

    def __init__(self, memory: FirecrackerMemory, plan: Plan, progress: Progress, zeroed_from: int) -> None:
        self.memory = memory
        self.area = WorkArea(memory)
        self._workload = _Workload(self.area, plan, progress, zeroed_from)
        self._verifying = asyncio.Lock()
        self.balloon_mib = 0

    @classmethod
    def booted(cls, kind: Kind) -> Guest:
        """Fill the memory and let the guest run."""
        memory = FirecrackerMemory(ranges_for(kind.size), kind.page_size, guarded=kind.guarded)
        memory.write(*BOOT_MARK)
        area = WorkArea(memory)
        working = max(1, round(area.pages * kind.working_set))
        plan = Plan(kind.seed, area.pages, working, round(HOLE_BLOCK * kind.sparse), Order.RANDOM)
        for number in range(plan.pages):
            if not plan.pattern.untouched(number, 0):
                area.write(number * PAGE, plan.pattern.page(number, 0))
        guest = cls(memory, plan, Progress(), plan.pages)
        guest.resume()
        return guest

    def state(self) -> bytes:
        """Return all that a guest is beside its memory."""
        memory, work = self.memory, self._workload
        return _FRAME.pack(memory.size, memory.page_size, work.zeroed_from, self.balloon_mib) + pack_state(
            work.plan, work.progress()
        )

    @classmethod
    def restored(cls, state: bytes, memory: FirecrackerMemory) -> Guest:
        """Return the guest of a state; it stands still."""
        zeroed_from, balloon = _FRAME.unpack_from(state)[2:]
        plan, progress = unpack_state(state[_FRAME.size :])
        guest = cls(memory, plan, progress, zeroed_from)
        guest.balloon_mib = balloon
        return guest

    async def pause(self) -> None:
        await self._workload.hold("api")

    def resume(self) -> None:
        self._workload.let_go("api")

    async def inflate(self, mib: int) -> None:
        """Give away so many MiB from the top, of those that are not worked on."""
        work, pages = self._workload, mib * MIB // PAGE
        first = max(work.plan.working, self.area.pages - pages)
        first += -(first + LOW // PAGE) % (self.memory.page_size // PAGE)
        last = work.zeroed_from
        self.balloon_mib = mib
        if first < last:
            await asyncio.to_thread(self.area.discard, first, last)
            work.zeroed_from = first

    def status(self, state: str) -> GuestStatus:
        work = self._workload
        return GuestStatus(work.steps, work.errors, state, work.longest_stall_ms())

    def take_findings(self) -> list[str]:
        return self._workload.take_findings()

    async def verify(self) -> Verification:
        async with self._verifying:
            await self._workload.hold("verifier")
            try:
                return await asyncio.to_thread(self._check)
            finally:
                self._workload.let_go("verifier")

    def _check(self) -> Verification:
        work = self._workload
        bad, first_bad = 0, []
        if self.memory.read(BOOT_MARK[0], len(BOOT_MARK[1])) != BOOT_MARK[1]:
            bad, first_bad = 1, ["the tables of the boot are gone"]
        for first in range(0, work.plan.pages, CHUNK):
            last = min(first + CHUNK, work.plan.pages)
            found = self.area.read(first * PAGE, (last - first) * PAGE)
            for number in range(first, last):
                page = found[(number - first) * PAGE :][:PAGE]
                version = work.plan.version(number, work.steps)
                expected = _ZEROES if number >= work.zeroed_from else work.plan.pattern.page(number, version)
                if page != expected:
                    bad += 1
                    first_bad.append(work.plan.pattern.explain(number, version, page))
        return Verification(work.plan.pages, bad, first_bad[:8])


def memory_for(state: bytes) -> FirecrackerMemory:
    """Return empty memory for the guest of a state."""
    try:
        size, page_size = _FRAME.unpack_from(state)[:2]
    except struct.error as error:
        raise FerryError(Reason.INVALID_ARGUMENT, "not a state of this kind of guest") from error
    return FirecrackerMemory(ranges_for(size), page_size)
