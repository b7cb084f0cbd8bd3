"""The source's end of Cloud Hypervisor's local migration: it takes the guest, and withholds the last answer.

The memfds that come are the guest's memory itself. They are served from here, without a copy, and stay readable when
the VMM has gone. On that last answer the VMM ends, so it gets it when the guest is whole elsewhere. Until then the VMM
waits with the guest paused, and stays so when the sidecar dies: it resumes no guest that was paused before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from typing import TYPE_CHECKING

from pageferry.abi import cloud_hypervisor as abi
from pageferry.abi.cloud_hypervisor import Command
from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.linux.unix_peer import peer_credentials
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm.cloud_hypervisor import protocol
from pageferryd.vmm.cloud_hypervisor.protocol import PeerConnection, unless_it_fails
from pageferryd.vmm.cloud_hypervisor.saved_guest import (
    MAX_CONFIG_BYTES,
    MAX_SLOTS,
    MAX_STATE_BYTES,
    SavedGuest,
    check_files,
    read_slots,
    refuse_unless_memfd,
)
from pageferryd.vmm.driver import Memory

if TYPE_CHECKING:
    from pathlib import Path

    from pageferryd.vmm.cloud_hypervisor.api import CloudHypervisorApi
    from pageferryd.vmm.cloud_hypervisor.protocol import Request

_SOCKET = "peer.sock"
_CALL_SECONDS = 2.0


class SourcePeer:
    """Takes one paused guest from the VMM of process `pid`."""

    def __init__(self, api: CloudHypervisorApi, runtime_dir: Path, pid: int) -> None:
        """Make the directory for the socket. FerryError: VMM_GONE, PERMISSION_MISSING."""
        self._api = api
        self._pid = pid
        self._vmm = f"the VMM at {api.path}"
        self._directory = VmmDirectory.make(runtime_dir, f"ch-{secrets.token_hex(6)}", pid)
        self._connection: PeerConnection | None = None
        self._call: asyncio.Task[None] | None = None
        self._files: dict[int, int] = {}
        self._withheld = False

    async def take(self) -> tuple[SavedGuest, Memory]:
        """Have the guest sent here, to the last request. FerryError where the VMM does it wrongly; it is refused."""
        with self._listen() as listener:
            url = f"unix:{self._directory.seen / _SOCKET}"
            self._call = asyncio.create_task(self._api.send_migration(url))
            try:
                saved = await unless_it_fails(self._walk(listener), self._call)
            except FerryError:
                await self.refuse()
                raise
            except BaseException:
                await self.close()
                raise
        self._withheld = True
        return saved, self._memory(saved)

    async def refuse(self) -> None:
        """Have the VMM give the migration up, and keep its guest, paused."""
        await self._end(ok=False)
        if self._call is not None:
            # Where the VMM answers at the end only, it has its guest back then.
            await asyncio.wait([self._call], timeout=_CALL_SECONDS)
        await self.close()

    async def complete(self) -> None:
        """Let the VMM end, unless it has. The memory stays readable."""
        if self._withheld:
            await self._end(ok=True)

    async def close(self) -> None:
        """Let the connection, the memory and the directory go. Twice does nothing."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        self._hang_up()
        while self._files:
            os.close(self._files.popitem()[1])
        self._directory.remove()

    async def _end(self, *, ok: bool) -> None:
        connection, self._withheld = self._connection, False
        if connection is not None:
            # A VMM that has gone needs no answer.
            with contextlib.suppress(FerryError):
                await connection.answer(ok=ok)
        self._hang_up()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        path = self._directory.path / _SOCKET
        try:
            listener.setblocking(False)
            listener.bind(str(path))
            # The directory lets the VMM's user in, and nobody else.
            path.chmod(0o666)
            listener.listen(1)
        except OSError as error:
            listener.close()
            self._directory.remove()
            raise FerryError(Reason.PERMISSION_MISSING, f"cannot listen for {self._vmm} at {path}: {error}") from error
        return listener

    # The walk

    async def _walk(self, listener: socket.socket) -> SavedGuest:
        connection = self._connection = await self._accept(listener)
        version = await self._start(connection)
        request = await self._take_slots(connection)
        config = await connection.receive_payload(request, MAX_CONFIG_BYTES)
        # Parsed beside the loop: other guests' faults are served meanwhile.
        slots = await asyncio.to_thread(read_slots, config)
        check_files(slots, self._files)
        await connection.answer(ok=True)
        request = await self._next(connection, Command.STATE)
        state = await connection.receive_payload(request, MAX_STATE_BYTES)
        if not state:
            raise FerryError(Reason.VMM_FAILED, f"{self._vmm} sent an empty state")
        await connection.answer(ok=True)
        request = await self._next(connection, Command.COMPLETE_PAUSED, Command.COMPLETE)
        if request.command is Command.COMPLETE:
            # It would resume the guest by itself should this sidecar die, whoever has it then.
            raise FerryError(Reason.VMM_FAILED, f"{self._vmm} was resumed by somebody else during the migration")
        return SavedGuest(version, config, state, slots)

    async def _accept(self, listener: socket.socket) -> PeerConnection:
        try:
            async with asyncio.timeout(protocol.STEP_SECONDS):
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        except TimeoutError as error:
            raise FerryError(
                Reason.VMM_FAILED, f"{self._vmm} did not connect for the migration within {protocol.STEP_SECONDS:g} s"
            ) from error
        peer = peer_credentials(accepted)
        if peer.pid != self._pid:
            accepted.close()
            raise FerryError(
                Reason.HANDOFF_WRONG_PEER,
                f"process {peer.pid} connected for the migration where process {self._pid} was expected",
            )
        return PeerConnection(accepted, self._vmm)

    async def _start(self, connection: PeerConnection) -> int:
        request = await self._next(connection, Command.START)
        version: int = abi.VERSION.unpack(request.headers)[0]
        if version != abi.PROTOCOL_VERSION or request.length:
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                f"{self._vmm} speaks version {version} of the migration protocol, and this sidecar "
                f"{abi.PROTOCOL_VERSION} only",
            )
        await connection.answer(ok=True)
        return version

    async def _take_slots(self, connection: PeerConnection) -> Request:
        """Take the memory slots; return the request behind them."""
        while True:
            request = await self._next(connection, Command.MEMORY_FD, Command.CONFIG)
            if request.command is Command.CONFIG:
                return request
            slot, fd = await connection.receive_slot(request)
            try:
                refuse_unless_memfd(slot, fd)
                if slot in self._files or len(self._files) >= MAX_SLOTS:
                    raise FerryError(
                        Reason.VMM_FAILED, f"{self._vmm} sent memory slot {slot} twice, or too many of them"
                    )
            except BaseException:
                os.close(fd)
                raise
            self._files[slot] = fd
            await connection.answer(ok=True)

    async def _next(self, connection: PeerConnection, *expected: Command) -> Request:
        request = await connection.receive_request()
        if request.command in expected:
            return request
        if request.command is Command.ABANDON:
            raise FerryError(Reason.VMM_FAILED, f"{self._vmm} gave the migration up; its log tells why")
        names = " or ".join(one.name for one in expected)
        raise FerryError(Reason.VMM_FAILED, f"{self._vmm} sent {request.command.name} where {names} was due")

    def _memory(self, saved: SavedGuest) -> Memory:
        locations = [
            memory_pb2.MemoryLocation(
                memfd=memory_pb2.MemfdMemory(fd=self._files[slot.number], offset=slot.file_offset)
            )
            for slot in saved.slots
        ]
        return Memory(saved.layout, locations, os.getpid())
