"""The driver for QEMU as it is: by its monitor (QMP), and by attaching to the process from outside."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.unix_peer import listener_pid
from pageferryd.linux.userfaultfd import find_userfaultfd
from pageferryd.vmm.driver import Activity, Description, GuardedMemory, Memory, PrivatePages, Saved
from pageferryd.vmm.qemu.attach import attach, detach
from pageferryd.vmm.qemu.blocks import FoundBlocks, find_blocks
from pageferryd.vmm.qemu.memory import layout_of, locations_of, paged, read_blobs, write_blobs
from pageferryd.vmm.qemu.monitor import Monitor
from pageferryd.vmm.qemu.movable import busy, obstacles, unfillable
from pageferryd.vmm.qemu.package import Package, pack, unpack
from pageferryd.vmm.qemu.state import (
    LoadPlan,
    SavePlan,
    close_plan,
    load_state,
    machine_of,
    ready_to_load,
    ready_to_save,
    save_state,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.v1 import vmm_pb2
    from pageferryd.vmm.driver import PagerSeat

DRIVER = "qemu"
_OPEN_SECONDS = 5.0
_LOAD_SECONDS = 60.0
_EXIT_SECONDS = 5.0
# RunState of qapi/run-state.json, where the guest stands and may go on.
_PAUSED = frozenset({"paused", "prelaunch", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "suspended"})
_IDLE_SECONDS = 5.0
"""How long the monitor, which serves one client at a time, is kept after the last call."""


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
        self._save: SavePlan | None = None
        self._load: LoadPlan | None = None
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
        self._load = await ready_to_load(monitor)
        attached = await asyncio.to_thread(attach, self._pid, blocks)
        self._remote = attached.remote
        seat.take(GuardedMemory(attached.uffd, [block.host_address for block in blocks]))

    async def pause(self) -> None:
        """Stop the guest; once more does nothing."""
        monitor = await self._open()
        await self._require(monitor, Activity.RUNNING, Activity.PAUSED)
        if self._save is None:
            self._save = await ready_to_save(monitor)
        await monitor.execute("stop")

    async def save_state(self) -> Saved:
        """Save devices and firmware blobs; the guest's disks are free for the destination then."""
        monitor = await self._open()
        await self._require(monitor, Activity.PAUSED)
        plan = self._save = self._save or await ready_to_save(monitor)
        state, blobs = await asyncio.gather(
            save_state(monitor, plan), asyncio.to_thread(read_blobs, self._pid, self._found)
        )
        return Saved(pack(Package(state, blobs)))

    async def private_pages(self) -> PrivatePages:
        """None: QEMU's confidential guests are not moved."""
        return PrivatePages()

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Refuse: there are no opaque pages."""
        raise FerryError(Reason.INVALID_ARGUMENT, f"QEMU at {self._path} exports no pages")

    async def load_state(self, state: bytes) -> None:
        """Load the devices, which touches guest memory."""
        monitor = await self._open()
        await self._require(monitor, Activity.INCOMING)
        package = unpack(state)
        await asyncio.to_thread(write_blobs, self._pid, self._found, package.blobs)
        await load_state(monitor, package.state, self._load or await ready_to_load(monitor), _LOAD_SECONDS)

    async def resume(self) -> None:
        """Let the guest run; its disks are locked by this."""
        monitor = await self._open()
        await self._require(monitor, Activity.RUNNING, Activity.PAUSED)
        await monitor.execute("cont")
        await self._require(monitor, Activity.RUNNING)
        await self._forget_save(monitor)

    async def detach_pager(self) -> None:
        """Close QEMU's own copy of the userfaultfd, which an earlier sidecar may have taken."""
        remote, self._remote = self._remote, None
        if remote is None:
            await self._open()
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
            await self._let_go()
            if not await asyncio.to_thread(process.wait, _EXIT_SECONDS):
                process.send_signal(signal.SIGKILL)
                if not await asyncio.to_thread(process.wait, _EXIT_SECONDS):
                    raise FerryError(Reason.VMM_FAILED, f"QEMU (process {pid}) was killed, and has not ended")

    async def close(self) -> None:
        """Let the monitor go."""
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
        if self._save is not None:
            # A guest that stands still, and may have to go on here.
            self._stay()
        elif self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            self._closing = asyncio.create_task(monitor.close())

    async def _let_go(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await self._forget_save(monitor)
            await monitor.close()

    async def _forget_save(self, monitor: Monitor) -> None:
        plan, self._save = self._save, None
        if plan is not None:
            await close_plan(monitor, plan)

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
