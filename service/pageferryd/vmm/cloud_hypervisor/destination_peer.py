"""The destination's end of Cloud Hypervisor's local migration: it gives the VMM a guest with empty memory files.

The VMM asks for pages on a second connection, from before it answers STATE on: restoring devices reads guest memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
from typing import TYPE_CHECKING

import structlog

from pageferry.abi import cloud_hypervisor as abi
from pageferry.abi.cloud_hypervisor import Command
from pageferry.errors import FerryError, Reason
from pageferryd.linux.unix_peer import peer_credentials
from pageferryd.vmm.cloud_hypervisor import protocol
from pageferryd.vmm.cloud_hypervisor.guard import refuse_unless_on_demand
from pageferryd.vmm.cloud_hypervisor.protocol import PeerConnection, unless_it_fails
from pageferryd.vmm.cloud_hypervisor.saved_guest import SavedGuest, Slot, for_receiver
from pageferryd.vmm.driver import GivenFiles

if TYPE_CHECKING:
    from pageferryd.vmm.cloud_hypervisor.api import CloudHypervisorApi
    from pageferryd.vmm.driver import PagerSeat

_log = structlog.get_logger(__name__)

_SOCKET = "receive.sock"
_LOOK_SECONDS = 0.005
_CALL_SECONDS = 1.0


class DestinationPeer:
    """Gives one guest to the VMM of process `pid`, which has none; `seat` fills its memory."""

    def __init__(self, api: CloudHypervisorApi, seat: PagerSeat, pid: int) -> None:
        self._api = api
        self._seat = seat
        self._pid = pid
        self._vmm = f"the VMM at {api.path}"
        self._connection: PeerConnection | None = None
        self._call: asyncio.Task[None] | None = None
        self._giving: asyncio.Task[None] | None = None
        self._completing: asyncio.Task[None] | None = None

    async def give(self, state: bytes) -> None:
        """Have the VMM receive the guest, which does not run yet. FerryError where it does not."""
        saved = await asyncio.to_thread(SavedGuest.unpack, state)
        if not saved.layout.same_as(self._seat.layout):
            raise FerryError(Reason.LAYOUT_MISMATCH, "the guest's state and its source disagree about its memory")
        url = f"unix:{self._seat.directory.seen / _SOCKET}"
        self._call = asyncio.create_task(self._api.receive_migration(url))
        self._giving = asyncio.create_task(unless_it_fails(self._walk(saved), self._call))
        await self._giving

    async def run(self) -> None:
        """Let the guest run. Whoever took an earlier call back may call again."""
        if self._completing is None:
            self._completing = asyncio.create_task(self._complete())
        await asyncio.shield(self._completing)

    async def close(self) -> None:
        """Hang up; a VMM that has not got all gives its guest up. Twice does nothing."""
        if self._call is not None:
            self._call.cancel()
        if self._giving is not None:
            # It ends with its call, and whoever waits for it learns why.
            await asyncio.wait([self._giving], timeout=_CALL_SECONDS)
        for task in (self._giving, self._completing, self._call):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def _complete(self) -> None:
        connection, call = self._connection, self._call
        if connection is None or call is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"{self._vmm} has no guest yet")
        await connection.ask(Command.COMPLETE)
        # The guest runs: what the API says now is worth a line, no more.
        await asyncio.wait([call], timeout=_CALL_SECONDS)
        if call.done() and (error := call.exception()) is not None:
            _log.warning("receive_migration_ended_badly", vmm=self._api.path, detail=str(error))

    async def _walk(self, saved: SavedGuest) -> None:
        connection = self._connection = await self._connect()
        await connection.ask(Command.START, headers=abi.VERSION.pack(saved.version))
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as undo:
            files = []
            for slot in saved.slots:
                fd = _empty_file(slot)
                undo.callback(os.close, fd)
                files.append((fd, slot.file_offset))
                await connection.hand_slot(slot.number, fd)
            await connection.ask(Command.CONFIG, await asyncio.to_thread(for_receiver, saved.config))
            faults = await self._connect()
            undo.callback(faults.close)
            await faults.announce(abi.ROLE_FAULT)
            given = faults.detach()
            witness = kept.enter_context(given.dup())
            undo.pop_all()
            self._seat.take(GivenFiles(files, given))
            await connection.ask(Command.STATE, saved.state)
            refuse_unless_on_demand(self._pid, self._vmm, has_all=_hung_up(witness))

    async def _connect(self) -> PeerConnection:
        """Connect to the VMM as soon as it listens."""
        path = str(self._seat.directory.path / _SOCKET)
        try:
            async with asyncio.timeout(protocol.STEP_SECONDS):
                # No event tells of a socket that is bound.
                while (connected := _try(path)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_SECONDS)
        except TimeoutError as error:
            raise FerryError(
                Reason.VMM_FAILED,
                f"{self._vmm} did not listen for its guest at {path} within {protocol.STEP_SECONDS:g} s",
            ) from error
        peer = peer_credentials(connected)
        if peer.pid != self._pid:
            connected.close()
            raise FerryError(
                Reason.HANDOFF_WRONG_PEER, f"process {peer.pid} listens at {path} where process {self._pid} was to"
            )
        return PeerConnection(connected, self._vmm)


def _hung_up(connection: socket.socket) -> bool:
    """Say whether the VMM asks for nothing more."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _try(path: str) -> socket.socket | None:
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        connecting.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
        connecting.close()
        return None
    except OSError as error:
        connecting.close()
        raise FerryError(Reason.VMM_FAILED, f"cannot connect to the VMM at {path}: {error}") from error
    return connecting


def _empty_file(slot: Slot) -> int:
    """Return a memfd for a slot, which nobody can make larger or smaller any more."""
    fd = -1
    try:
        fd = os.memfd_create(f"slot-{slot.number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, slot.file_size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise FerryError(
            Reason.NO_SPACE, f"cannot make a memory file of {slot.file_size} bytes for the guest: {error}"
        ) from error
    return fd
