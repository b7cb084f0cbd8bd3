"""The driver for QEMU as it is: by its monitor (QMP), and by attaching to the process from outside."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.unix_peer import listener_pid
from pageferryd.linux.userfaultfd import find_userfaultfd
from pageferryd.vmm.driver import Activity, Description, GuardedMemory, Memory, PrivatePages, Saved
from pageferryd.vmm.qemu.attach import attach, detach
from pageferryd.vmm.qemu.blobs import LeavingBlobs, WaitingBlobs
from pageferryd.vmm.qemu.blocks import FoundBlocks, find_blocks
from pageferryd.vmm.qemu.memory import layout_of, locations_of, paged
from pageferryd.vmm.qemu.monitor import Monitor
from pageferryd.vmm.qemu.movable import busy, obstacles, unfillable
from pageferryd.vmm.qemu.package import Package, pack, unpack
from pageferryd.vmm.qemu.state import (
    LoadPlan,
    SavePlan,
    await_state,
    close_plan,
    forget_way,
    load_state,
    machine_of,
    ready_to_load,
    ready_to_save,
    save_state,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from pageferry.v1 import vmm_pb2
    from pageferryd.vmm.driver import PagerSeat

DRIVER = "qemu"
_OPEN_SECONDS = 5.0
_LOAD_SECONDS = 60.0
_EXIT_SECONDS = 5.0
# RunState of qapi/run-state.json, where the guest stands and may go on.
_PAUSED = frozenset({"paused", "prelaunch", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "suspended"})
_SHORT_BYTES = 8 << 20
"""Of blobs, that are compared in less time than a hop to another thread and back may take."""
_IDLE_SECONDS = 5.0
"""How long the monitor, which serves one client at a time, is kept after the last call."""


_T = TypeVar("_T")


class _Leaving(NamedTuple):
    """What was readied before the guest of a source stood still."""

    plan: SavePlan
    blobs: LeavingBlobs


class _Waiting(NamedTuple):
    """What was readied before there was a state to load, and where QEMU waits for that."""

    plan: LoadPlan
    blobs: WaitingBlobs
    connection: socket.socket


class QemuDriver:
    """One QEMU behind its QMP socket."""

    memory_comes_with_state = False

    def __init__(self, socket_path: str) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the path is absolute and fits a socket address."""
        addresses.normalise(f"unix:{socket_path}")
        self._path = socket_path
        self._monitor: Monitor | None = None
        self._opening = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._pid = 0
        self._found = FoundBlocks([], [])
        self._remote: int | None = None
        self._leaving: _Leaving | None = None
        self._waiting: _Waiting | None = None
        self._stands = False
        """Whether this driver itself has the guest stand, which need not be asked then."""
        self._closing: asyncio.Task[None] | None = None

    async def describe(self) -> Description:
        """Look at the machine, its RAM and what it does."""
        monitor = await self._open()
        activity = await self._activity(monitor)
        problem = await busy(monitor)
        incoming = activity is Activity.INCOMING
        in_the_way = await obstacles(monitor, self._pid)
        if problem is not None and not incoming:
            in_the_way.append(problem)
        self._found = await find_blocks(monitor, self._pid)
        blocks = paged(self._found)
        layout = layout_of(blocks)
        memory = None if incoming else Memory(layout, locations_of(self._pid, blocks), self._pid)
        return Description(
            activity, self._pid, layout, memory, machine=await machine_of(monitor), obstacles=tuple(in_the_way)
        )

    async def attach_pager(self, seat: PagerSeat) -> None:
        """Take the memory of a QEMU that waits: guard it, empty it, and give the userfaultfd to the pager."""
        monitor = await self._open()
        await self._require(monitor, Activity.INCOMING)
        if self._remote is not None:
            raise FerryError(Reason.ILLEGAL_STATE, f"the memory of QEMU (process {self._pid}) was taken already")
        found = await find_blocks(monitor, self._pid)
        blocks = paged(found)
        unfit = [*unfillable(blocks), *await obstacles(monitor, self._pid)]
        if unfit:
            raise FerryError(Reason.VMM_MISMATCH, f"QEMU (process {self._pid}) cannot take a guest: {'; '.join(unfit)}")
        self._found = found
        plan = await ready_to_load(monitor)
        attached = await asyncio.to_thread(attach, self._pid, blocks)
        self._remote = attached.remote
        seat.take(GuardedMemory(attached.uffd, [block.host_address for block in blocks]))
        self._waiting = await self._await_state(monitor, plan)

    async def ready_to_pause(self) -> None:
        """Give QEMU the file for its state, and read the blobs."""
        monitor = await self._open()
        await self._require(monitor, Activity.RUNNING, Activity.PAUSED)
        if self._leaving is None:
            self._leaving = await self._ready_to_leave(monitor)

    async def pause(self) -> None:
        """Stop the guest; once more does nothing."""
        if self._leaving is None:
            await self.ready_to_pause()
        monitor = await self._open()
        await monitor.execute("stop")
        self._stands = True

    async def save_state(self) -> Saved:
        """Save devices and firmware blobs; the guest's disks are free for the destination then."""
        monitor = await self._open()
        if not self._stands:
            await self._require(monitor, Activity.PAUSED)
        plan, blobs = self._leaving = self._leaving or await self._ready_to_leave(monitor)
        content = await _soon(blobs.size, blobs.as_they_are)
        return Saved(pack(Package(await save_state(monitor, plan), content)))

    async def private_pages(self) -> PrivatePages:
        """None: QEMU's confidential guests are not moved."""
        return PrivatePages()

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Refuse: there are no opaque pages."""
        raise FerryError(Reason.INVALID_ARGUMENT, f"QEMU at {self._path} exports no pages")

    async def load_state(self, state: bytes) -> None:
        """Load the devices, which touches guest memory."""
        monitor = await self._open()
        if self._waiting is None:
            await self._require(monitor, Activity.INCOMING)
            self._waiting = await self._await_state(monitor, await ready_to_load(monitor))
        plan, blobs, connection = self._waiting
        package = unpack(state)
        await _soon(blobs.size, partial(blobs.become, package.blobs))
        await load_state(monitor, package.state, plan, connection, _LOAD_SECONDS)
        self._hang_up()
        self._stands = True

    async def resume(self) -> None:
        """Let the guest run; its disks are locked by this."""
        monitor = await self._open()
        if not self._stands:
            await self._require(monitor, Activity.RUNNING, Activity.PAUSED)
        self._stands = False
        await monitor.execute("cont")
        await self._require(monitor, Activity.RUNNING)
        await self._forget_leaving(monitor)

    async def detach_pager(self) -> None:
        """Close QEMU's own copy of the userfaultfd, which an earlier sidecar may have taken."""
        monitor = await self._open()
        await forget_way(monitor)
        remote, self._remote = self._remote, None
        if remote is None:
            remote = find_userfaultfd(self._pid)
        await asyncio.to_thread(detach, self._pid, remote)
        await self._let_go()

    async def kill(self) -> None:
        """Have it quit; a QEMU that hangs, on memory that will not come for one, is killed."""
        pid = self._pid
        if not pid:
            return
        try:
            process = PidFd(pid)
        except FerryError:
            return
        with process:
            try:
                monitor = await self._open()
                await monitor.execute("quit", seconds=_EXIT_SECONDS)
            except FerryError:
                # It may end before it answers, or be past answering.
                pass
            self._hang_up()
            await self._let_go()
            if not await asyncio.to_thread(process.wait, _EXIT_SECONDS):
                process.send_signal(signal.SIGKILL)
                if not await asyncio.to_thread(process.wait, _EXIT_SECONDS):
                    raise FerryError(Reason.VMM_FAILED, f"QEMU (process {pid}) was killed, and has not ended")

    async def close(self) -> None:
        """Let the monitor go. A QEMU that waits for a state waits on, and gets none any more."""
        self._hang_up()
        await self._let_go()

    async def _open(self) -> Monitor:
        async with self._opening:
            if self._monitor is not None and self._monitor.is_closed:
                await self._let_go()
            if self._monitor is None:
                pid = await asyncio.to_thread(listener_pid, self._path, _OPEN_SECONDS)
                self._monitor = await Monitor.open(self._path, _OPEN_SECONDS)
                self._pid = pid
            self._stay()
            return self._monitor

    def _stay(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._is_idle)

    def _is_idle(self) -> None:
        if self._stands or self._waiting is not None:
            # A guest that stands still, or is about to come.
            self._stay()
        elif self._monitor is not None:
            self._closing = asyncio.create_task(self._let_go())

    async def _let_go(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        monitor, self._monitor = self._monitor, None
        self._stands = False
        if monitor is not None:
            await self._forget_leaving(monitor)
            await monitor.close()

    async def _ready_to_leave(self, monitor: Monitor) -> _Leaving:
        plan = await ready_to_save(monitor)
        try:
            return _Leaving(plan, await asyncio.to_thread(LeavingBlobs, self._pid, self._found))
        except BaseException:
            await close_plan(monitor, plan)
            raise

    async def _forget_leaving(self, monitor: Monitor) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            await close_plan(monitor, leaving.plan)

    async def _await_state(self, monitor: Monitor, plan: LoadPlan) -> _Waiting:
        blobs = await asyncio.to_thread(WaitingBlobs, self._pid, self._found)
        return _Waiting(plan, blobs, await await_state(monitor, plan))

    def _hang_up(self) -> None:
        """Close our end of the way to a state."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.connection.close()

    async def _activity(self, monitor: Monitor) -> Activity:
        answer = await monitor.execute("query-status")
        status = answer.get("status") if isinstance(answer, dict) else None
        if status == "inmigrate":
            return Activity.INCOMING
        if status == "running":
            return Activity.RUNNING
        if status in _PAUSED:
            return Activity.PAUSED
        raise FerryError(
            Reason.VMM_FAILED, f"the guest of QEMU at {self._path} is {status!r}: it can neither be moved nor wait"
        )

    async def _require(self, monitor: Monitor, *allowed: Activity) -> None:
        found = await self._activity(monitor)
        if found not in allowed:
            raise FerryError(
                Reason.ILLEGAL_STATE,
                f"QEMU at {self._path} is {found.value}; this needs one that is "
                f"{' or '.join(one.value for one in allowed)}",
            )


async def _soon(size: int, work: Callable[[], _T]) -> _T:
    """Do some work on so many bytes while the guest stands."""
    return work() if size <= _SHORT_BYTES else await asyncio.to_thread(work)
