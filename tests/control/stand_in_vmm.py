"""A VMM in this process, behind the driver's interface: remembers its calls, waits or fails where a test says so."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Sequence

from pageferry.v1 import memory_pb2, vmm_pb2
from pageferry.vmm.handoff import PagerLink
from pageferry.vmm.memory import GuestMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.vmm.driver import Activity, Description, Memory, PagerSeat, PrivatePages, Saved

PAGES = 16


class Gate:
    """Where a call waits until it is opened; `reached` is set while one waits."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def passed(self) -> None:
        self.reached.set()
        await self.opened.wait()

    async def until_reached(self) -> None:
        await asyncio.wait_for(self.reached.wait(), 10)


class StandInVmm:
    """Both the VMM and its driver. `failures[call]` is raised by that call, `gates[call]` is passed in it."""

    def __init__(self, activity: Activity = Activity.RUNNING, pages: int = PAGES) -> None:
        self.memory_comes_with_state = False
        self.machine = "pc-i440fx-7.2"
        self.takes_any_guest = False
        self.tells_memory_with_state = False
        self.seat: PagerSeat | None = None
        self.activity = activity
        self.layout = Layout([Region(0, pages * PAGE_SIZE)])
        self.memory = GuestMemory(pages * PAGE_SIZE)
        self.calls: list[str] = []
        self.failures: dict[str, BaseException] = {}
        self.gates: dict[str, Gate] = defaultdict(Gate)
        self.gated: set[str] = set()
        self.private = PrivatePages()
        self.loaded: bytes | None = None
        self.read = b""
        self.killed = False
        self.closed = False
        self.link: PagerLink | None = None

    @property
    def runs(self) -> bool:
        return self.activity is Activity.RUNNING and not self.killed

    def gate(self, call: str) -> Gate:
        self.gated.add(call)
        return self.gates[call]

    async def _do(self, call: str) -> None:
        self.calls.append(call)
        if call in self.gated:
            await self.gates[call].passed()
        failure = self.failures.get(call)
        if failure is not None:
            raise failure

    async def describe(self) -> Description:
        await self._do("describe")
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self.memory.address))
        locations = [location] if self.activity is not Activity.INCOMING else []
        memory = Memory(self.layout, locations, os.getpid()) if locations else None
        if self.takes_any_guest or self.tells_memory_with_state:
            return Description(self.activity, os.getpid(), None, memory_bytes=self.memory.size, machine=self.machine)
        return Description(self.activity, os.getpid(), self.layout, memory, machine=self.machine)

    async def attach_pager(self, seat: PagerSeat) -> None:
        await self._do("attach_pager")
        self.seat = seat
        if not self.memory_comes_with_state:
            await self._hand_over(seat)

    async def _hand_over(self, seat: PagerSeat) -> None:
        self.link = await asyncio.to_thread(PagerLink.open, seat.socket_path, self.memory)

    async def ready_to_pause(self) -> None:
        assert self.activity is Activity.RUNNING

    async def pause(self) -> None:
        await self._do("pause")
        self.activity = Activity.PAUSED

    async def save_state(self) -> Saved:
        await self._do("save_state")
        if not self.tells_memory_with_state:
            return Saved(b"state")
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self.memory.address))
        return Saved(b"state", Memory(self.layout, [location], os.getpid()))

    async def private_pages(self) -> PrivatePages:
        await self._do("private_pages")
        return self.private

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        await self._do("export_pages")
        return [vmm_pb2.GuestPageBundle(guest_addresses=guest_addresses, payload=b"sealed", metadata=b"meta")]

    async def load_state(self, state: bytes) -> None:
        await self._do("load_state")
        if self.memory_comes_with_state and self.seat is not None:
            await self._hand_over(self.seat)
            # A VMM reads its guest's memory as it loads the state.
            self.read = await asyncio.to_thread(self.memory.read, 0, 1)
        self.loaded = state

    async def resume(self) -> None:
        await self._do("resume")
        self.activity = Activity.RUNNING

    async def detach_pager(self) -> None:
        await self._do("detach_pager")

    async def kill(self) -> None:
        await self._do("kill")
        self.killed = True

    async def close(self) -> None:
        self.closed = True

    def free(self) -> None:
        """Let its memory go, when the test is over."""
        if self.link is not None:
            self.link.close()
        self.memory.close()
