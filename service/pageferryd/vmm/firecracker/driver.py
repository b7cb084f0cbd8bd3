"""The driver for Firecracker behind its API socket."""

from __future__ import annotations

import asyncio
import secrets
import signal
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.unix_peer import listener_pid
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm.driver import Activity, Description, PrivatePages, Saved
from pageferryd.vmm.firecracker import state_file
from pageferryd.vmm.firecracker.api import FirecrackerApi
from pageferryd.vmm.firecracker.memory import find_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Final

    from pageferry.v1 import vmm_pb2
    from pageferryd.vmm.driver import PagerSeat
    from pageferryd.vmm.firecracker.api import Instance, Machine

_log = structlog.get_logger(__name__)

DRIVER = "firecracker"
_QUICK_SECONDS: Final = 5.0
_TERM_SECONDS: Final = 1.0
_EXIT_SECONDS: Final = 5.0
_STATE: Final = "vmstate"
_MEMORY: Final = "memory"
_NOWHERE: Final = "not-wanted/memory"
_ONLY_MEMORY_REFUSED: Final = "Cannot perform open on the memory backing file"


class FirecrackerDriver:
    """One Firecracker; `address` is its API socket, `runtime_dir` where files for it may lie."""

    memory_comes_with_state = True

    def __init__(self, address: str, runtime_dir: Path) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the address is an absolute path that fits a socket address."""
        self._api = FirecrackerApi(address)
        self._runtime_dir = runtime_dir
        self._process: PidFd | None = None
        self._seat: PagerSeat | None = None

    async def describe(self) -> Description:
        """Ask for state and size; where the memory lies is found in the process that listens at the socket."""
        pid = await asyncio.to_thread(self._find_process)
        instance = await self._api.instance()
        name = _machine_name(instance)
        if instance.activity is Activity.INCOMING:
            return Description(Activity.INCOMING, pid, None, machine=name)
        machine, obstacles = await asyncio.gather(self._api.machine(), self._api.obstacles())
        memory = None
        try:
            memory = await asyncio.to_thread(find_memory, pid, machine.memory_bytes, machine.page_size)
        except FerryError as error:
            if error.reason is not Reason.LAYOUT_INVALID:
                raise
            obstacles.append(error.message)
        return Description(
            instance.activity,
            pid,
            memory.layout if memory is not None else None,
            memory,
            machine.memory_bytes,
            name,
            obstacles,
        )

    async def attach_pager(self, seat: PagerSeat) -> None:
        """Remember who will fill the memory: Firecracker makes it as it loads the state."""
        await self._require("take a guest in", Activity.INCOMING)
        self._seat = seat

    async def ready_to_pause(self) -> None:
        """Nothing can be done before."""

    async def pause(self) -> None:
        """Stop the guest."""
        await self._require("be paused", Activity.RUNNING, Activity.PAUSED)
        await self._api.pause()

    async def save_state(self) -> Saved:
        """Have the state written to a file, without the memory where that can be (docs/vmm-firecracker.md)."""
        await self._require("save its state", Activity.PAUSED)
        pid = self._known().pid
        name = f"fc-{secrets.token_hex(8)}"
        directory = VmmDirectory.make(self._runtime_dir, name, pid)
        try:
            state = await self._state_alone(directory)
            if not state:
                state = await self._state_with_memory(directory)
        finally:
            await asyncio.to_thread(directory.remove)
        return Saved(state)

    async def private_pages(self) -> PrivatePages:
        """Return none: every page is where anybody with the right can read it."""
        return PrivatePages()

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Refuse: there are no private pages."""
        raise FerryError(
            Reason.INVALID_ARGUMENT, f"Firecracker has no private pages ({len(guest_addresses)} asked for)"
        )

    async def load_state(self, state: bytes) -> None:
        """Have the state loaded; Firecracker hands the memory over to the pager meanwhile."""
        await self._require("load a state", Activity.INCOMING)
        seat = self._seat
        if seat is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"the VMM at {self._api.path} has no pager yet")
        path = seat.directory.path / _STATE
        await asyncio.to_thread(state_file.put, path, state)
        try:
            await self._api.load_snapshot(str(seat.directory.seen / _STATE), seat.socket_path)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def resume(self) -> None:
        """Let the guest run."""
        await self._require("run", Activity.PAUSED, Activity.RUNNING)
        await self._api.resume()

    async def detach_pager(self) -> None:
        """Do nothing: Firecracker keeps its userfaultfd, over which the kernel watches nothing any more."""
        self._seat = None

    async def kill(self) -> None:
        """End the process: Firecracker has no call for that."""
        process = self._process
        if process is None:
            return
        if not await asyncio.to_thread(_end, process):
            raise FerryError(
                Reason.VMM_FAILED, f"the VMM at {self._api.path} (process {process.pid}) was killed, and has not ended"
            )

    async def close(self) -> None:
        """Let the process go; it is not touched."""
        process, self._process, self._seat = self._process, None, None
        if process is not None:
            process.close()

    def _find_process(self) -> int:
        """Hold the process that listens: another one that gets its id later is not taken for it."""
        pid = listener_pid(self._api.path, _QUICK_SECONDS)
        if pid <= 0:
            raise FerryError(
                Reason.VMM_FAILED,
                f"the process of the VMM at {self._api.path} cannot be seen: run pageferryd in the host's "
                "pid namespace",
            )
        known = self._process
        if known is None or known.pid != pid or known.exited:
            self._process = PidFd(pid)
            if known is not None:
                known.close()
        return pid

    def _known(self) -> PidFd:
        if self._process is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"the VMM at {self._api.path} was not described yet")
        return self._process

    async def _require(self, what: str, *allowed: Activity) -> None:
        instance = await self._api.instance()
        if instance.activity not in allowed:
            raise FerryError(
                Reason.ILLEGAL_STATE, f"the VMM at {self._api.path} is {instance.activity.value}: it cannot {what} now"
            )

    async def _state_alone(self, directory: VmmDirectory) -> bytes:
        """Return the state, or nothing where it is not complete for certain.

        Firecracker writes the state, syncs it, and only then opens the memory's file: for that it gets a path that
        cannot be opened.
        """
        refusal = ""
        try:
            await self._api.create_snapshot(str(directory.seen / _STATE), str(directory.seen / _NOWHERE), "Full")
        except FerryError as error:
            if error.reason is not Reason.VMM_FAILED:
                raise
            refusal = error.message
        expected = not refusal or _ONLY_MEMORY_REFUSED in refusal
        state = await asyncio.to_thread(state_file.take, directory.path / _STATE)
        if expected and await asyncio.to_thread(state_file.is_complete, state):
            _log.info("firecracker_state_saved", vmm=self._api.path, bytes=len(state), memory_file="none")
            return state
        _log.warning("firecracker_state_incomplete", vmm=self._api.path, bytes=len(state), detail=refusal)
        return b""

    async def _state_with_memory(self, directory: VmmDirectory) -> bytes:
        """Have a whole snapshot written, and keep the state of it. The guest stands still for longer."""
        machine: Machine = await self._api.machine()
        kind = "Diff" if machine.tracks_dirty_pages else "Full"
        await self._api.create_snapshot(str(directory.seen / _STATE), str(directory.seen / _MEMORY), kind)
        state = await asyncio.to_thread(state_file.take, directory.path / _STATE)
        if not state:
            raise FerryError(Reason.VMM_FAILED, f"the VMM at {self._api.path} says it saved its state, and did not")
        _log.warning("firecracker_state_saved", vmm=self._api.path, bytes=len(state), memory_file=kind)
        return state


def _machine_name(instance: Instance) -> str:
    """States are tied to releases: patches of one minor release share their format, other releases need not."""
    major, minor = instance.release
    return f"Firecracker {major}.{minor}"


def _end(process: PidFd) -> bool:
    try:
        process.send_signal(signal.SIGTERM)
        if process.wait(_TERM_SECONDS):
            return True
        # As the first process of a pid namespace it does not hear SIGTERM.
        process.send_signal(signal.SIGKILL)
        return process.wait(_EXIT_SECONDS)
    except FerryError as error:
        if error.reason is Reason.VMM_GONE:
            return True
        raise
