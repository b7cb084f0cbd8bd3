"""The process guest as a VMM: its memory, its worker, and what the sidecar and the person at its terminal ask of it."""

from __future__ import annotations

import asyncio
import os

from pageferry.errors import FerryError, Reason
from pageferry.guests.control import LISTED_FINDINGS, GuestStatus, Verification
from pageferry.guests.process.plan import Plan, Progress, pack_state, unpack_state
from pageferry.guests.process.worker import Worker
from pageferry.vmm import GuestMemory, MemoryDescription, PagerLink, Vmm, VmmState
from pageferry.vmm.regions import PAGE_SIZE

CHUNK_PAGES = 64
"""How many pages are read at once when all are checked."""
EXIT_SECONDS = 0.05
"""How long a killed guest lives on, so that the answer gets out."""

_SIDECAR = "sidecar"
_VERIFIER = "verifier"


class ProcessGuest(Vmm):
    """A guest over `memory`: running a plan, or incoming and without one."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._state = VmmState.INCOMING
        self._worker: Worker | None = None
        self._link: PagerLink | None = None
        self._verifying = asyncio.Lock()

    @classmethod
    def started(cls, memory: GuestMemory, plan: Plan) -> ProcessGuest:
        """Fill the memory and let the plan run."""
        guest = cls(memory)
        _fill(memory, plan)
        guest._worker = Worker(memory, plan, Progress())
        guest._worker.let_go(_SIDECAR)
        guest._state = VmmState.RUNNING
        return guest

    async def describe_memory(self) -> MemoryDescription:
        """One region from guest address 0."""
        return MemoryDescription(self._state, [self._memory.region()])

    async def attach_pager(self, socket_path: str) -> None:
        """Hand the memory over. Blocks in connect, so not in the event loop."""
        # Nothing but user-mode memcpy touches the memory: the unprivileged kind of userfaultfd sees all faults.
        self._link = await asyncio.to_thread(
            PagerLink.open, socket_path, self._memory, user_mode_only=os.geteuid() != 0
        )

    async def pause(self) -> None:
        """Wait until the worker stands between two steps, however long its page takes to come."""
        await self._required().hold(_SIDECAR)
        self._state = VmmState.PAUSED

    async def save_state(self) -> bytes:
        """Return the plan and the progress."""
        worker = self._required()
        return pack_state(worker.plan, worker.progress())

    async def load_state(self, state: bytes) -> None:
        """Take plan and progress over; the memory must have as many pages."""
        plan, progress = unpack_state(state)
        if plan.pages * PAGE_SIZE != self._memory.size:
            raise FerryError(
                Reason.LAYOUT_MISMATCH,
                f"the state is of a guest with {plan.pages * PAGE_SIZE} bytes of memory, and this one was started with "
                f"{self._memory.size}: start it with the same --memory",
            )
        self._worker = Worker(self._memory, plan, progress)

    async def resume(self) -> None:
        """Let the worker go on."""
        self._required().let_go(_SIDECAR)
        self._state = VmmState.RUNNING

    async def detach_pager(self) -> None:
        """Let the userfaultfd and the pager's socket go."""
        if self._link is not None:
            self._link.close()

    async def kill(self) -> None:
        """Exit as soon as the answer is out."""
        asyncio.get_running_loop().call_later(EXIT_SECONDS, os._exit, 0)

    def status(self) -> GuestStatus:
        """Tell how far the guest is, without waiting for it."""
        worker = self._worker
        if worker is None:
            return GuestStatus(0, 0, self._state.value)
        return GuestStatus(worker.steps, worker.errors, self._state.value, worker.longest_stall_ms())

    async def verify(self) -> Verification:
        """Hold the worker and check every byte in a thread of its own: reading may wait for pages."""
        if self._state is VmmState.INCOMING:
            raise FerryError(Reason.GUEST_NOT_RUNNING, "the guest is incoming: it has no memory to check yet")
        worker = self._required()
        async with self._verifying:
            await worker.hold(_VERIFIER)
            try:
                return await asyncio.to_thread(_check, self._memory, worker.plan, worker.steps)
            finally:
                worker.let_go(_VERIFIER)

    def take_findings(self) -> list[str]:
        """Return what the worker found wrong since the last call."""
        return self._worker.take_findings() if self._worker is not None else []

    def _required(self) -> Worker:
        if self._worker is None:
            raise FerryError(Reason.ILLEGAL_STATE, "the guest is incoming and has no state yet: load one first")
        return self._worker


def _fill(memory: GuestMemory, plan: Plan) -> None:
    """Write version 0 of every page that is not a hole."""
    for number in range(plan.pages):
        if not plan.pattern.untouched(number, 0):
            memory.write(number * PAGE_SIZE, plan.pattern.page(number, 0))


def _check(memory: GuestMemory, plan: Plan, steps: int) -> Verification:
    """Compare every page with what it must hold after `steps` steps."""
    bad = 0
    first_bad: list[str] = []
    for first in range(0, plan.pages, CHUNK_PAGES):
        last = min(first + CHUNK_PAGES, plan.pages)
        found = memory.read(first * PAGE_SIZE, (last - first) * PAGE_SIZE)
        for number in range(first, last):
            version = plan.version(number, steps)
            page = found[(number - first) * PAGE_SIZE :][:PAGE_SIZE]
            if page == plan.pattern.page(number, version):
                continue
            bad += 1
            if len(first_bad) < LISTED_FINDINGS:
                first_bad.append(plan.pattern.explain(number, version, page))
    return Verification(plan.pages, bad, first_bad)
