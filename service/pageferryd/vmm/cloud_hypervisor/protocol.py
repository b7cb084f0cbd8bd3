"""One connection of Cloud Hypervisor's migration protocol, as its peer sees it: bounded lengths, bounded waits."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from pageferry.abi import cloud_hypervisor as abi
from pageferry.abi.cloud_hypervisor import Command
from pageferry.errors import FerryError, Reason
from pageferryd.linux.unix_peer import recv_with_fds

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any, TypeVar

    _T = TypeVar("_T")

STEP_SECONDS = 20.0
"""How long the VMM may take for one step of the protocol."""
_CHUNK = 1 << 20


class HungUpError(FerryError):
    """VMM_FAILED: the VMM closed the connection. Its API may tell why."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.VMM_FAILED, message)


class Request(NamedTuple):
    """A request's header; `length` bytes of payload follow."""

    command: Command
    headers: bytes
    length: int


class PeerConnection:
    """A connection to one VMM, which this object owns. `vmm` names the VMM in errors.

    Every method raises FerryError: HungUpError, or VMM_FAILED where the VMM is silent or says what it may not.
    """

    def __init__(self, connection: socket.socket, vmm: str) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._vmm = vmm

    def close(self) -> None:
        """Hang up. Twice does nothing."""
        self._connection.close()

    # The VMM asks

    async def receive_request(self) -> Request:
        """Return the next request."""
        header = await self._bounded(self._receive(abi.REQUEST.size), "send the next request")
        number, headers, length = abi.REQUEST.unpack(header)
        try:
            return Request(Command(number), headers, length)
        except ValueError as error:
            raise self._failed(f"sent a request that the protocol does not have: {number}") from error

    async def receive_payload(self, request: Request, longest: int) -> bytes:
        """Return a request's payload of at most `longest` bytes."""
        if request.length > longest:
            raise self._failed(f"sends {request.command.name} of {request.length} bytes: at most {longest} are taken")
        return await self._bounded(self._receive(request.length), f"send all of {request.command.name}")

    async def receive_slot(self, request: Request) -> tuple[int, int]:
        """Return the slot of a MEMORY_FD request, and its descriptor, which the caller owns."""
        if request.length != abi.SLOT.size:
            raise self._failed(f"sends MEMORY_FD of {request.length} bytes: it has {abi.SLOT.size}")
        await self._bounded(self._readable(), "send a memory slot")
        try:
            received = recv_with_fds(self._connection, abi.SLOT.size, 1)
        except OSError as error:
            raise self._hung_up(error) from error
        if len(received.fds) != 1 or received.truncated or len(received.data) != abi.SLOT.size:
            for fd in received.fds:
                os.close(fd)
            raise self._failed("sent a memory slot without its one descriptor")
        return abi.SLOT.unpack(received.data)[0], received.fds[0]

    async def answer(self, *, ok: bool) -> None:
        """Answer the last request."""
        status = abi.STATUS_OK if ok else abi.STATUS_ERROR
        await self._bounded(self._send(abi.RESPONSE.pack(status, 0)), "take an answer")

    # The VMM is asked

    async def ask(self, command: Command, payload: bytes = b"", headers: bytes = abi.NO_HEADERS) -> None:
        """Send a request, and wait until the VMM says that it is done."""
        request = abi.REQUEST.pack(command, headers, len(payload))
        what = f"take {command.name}"
        await self._bounded(self._send(request + payload), what)
        await self._expect_ok(command)

    async def hand_slot(self, slot: int, fd: int) -> None:
        """Give the VMM a memory slot's descriptor, which stays the caller's too."""
        what = f"take memory slot {slot}"
        await self._bounded(self._send(abi.REQUEST.pack(Command.MEMORY_FD, abi.NO_HEADERS, abi.SLOT.size)), what)
        await self._bounded(self._writable(), what)
        try:
            sent = socket.send_fds(self._connection, [abi.SLOT.pack(slot)], [fd])
        except OSError as error:
            raise self._hung_up(error) from error
        if sent != abi.SLOT.size:
            raise self._failed(f"took {sent} bytes of memory slot {slot}")
        await self._expect_ok(Command.MEMORY_FD)

    async def announce(self, role: int) -> None:
        """Say what this further connection is for."""
        await self._bounded(self._send(abi.ROLE.pack(role)), "take a further connection")

    def detach(self) -> socket.socket:
        """Return the socket, which is the caller's from now on."""
        return self._connection

    async def _expect_ok(self, command: Command) -> None:
        answer = await self._bounded(self._receive(abi.RESPONSE.size), f"answer {command.name}")
        status, length = abi.RESPONSE.unpack(answer)
        if status != abi.STATUS_OK or length:
            raise self._failed(f"refused {command.name} (status {status}, {length} bytes); its log tells why")

    # Bytes

    async def _receive(self, length: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < length:
            # Grown as it comes: a length is only a promise.
            part = await loop.sock_recv(self._connection, min(_CHUNK, length - len(data)))
            if not part:
                raise self._hung_up(None)
            data += part
        return bytes(data)

    async def _send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def _readable(self) -> None:
        loop, ready, fd = asyncio.get_running_loop(), asyncio.Event(), self._connection.fileno()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)

    async def _writable(self) -> None:
        loop, ready, fd = asyncio.get_running_loop(), asyncio.Event(), self._connection.fileno()
        loop.add_writer(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(fd)

    async def _bounded(self, step: Coroutine[Any, Any, _T], what: str) -> _T:
        try:
            async with asyncio.timeout(STEP_SECONDS):
                return await step
        except TimeoutError as error:
            raise self._failed(f"did not {what} within {STEP_SECONDS:g} s") from error
        except OSError as error:
            raise self._hung_up(error) from error

    def _failed(self, what: str) -> FerryError:
        return FerryError(Reason.VMM_FAILED, f"{self._vmm} {what}")

    def _hung_up(self, error: OSError | None) -> HungUpError:
        return HungUpError(f"{self._vmm} hung up in the middle of the migration{f': {error}' if error else ''}")


async def unless_it_fails(step: Coroutine[Any, Any, _T], call: asyncio.Task[None]) -> _T:
    """Return what `step` returns; where `call` to the VMM's API fails meanwhile, raise what that fails with.

    FerryError(VMM_FAILED) where `call` is cancelled: somebody gave the migration up meanwhile.
    """
    walking = asyncio.create_task(step)
    try:
        waiting: set[asyncio.Future[Any]] = {walking, call}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not walking.done():
            _raise_failure(call)
        try:
            return await walking
        except HungUpError:
            # The reason is in the answer, where that waits for the end of the migration.
            await asyncio.wait({call}, timeout=1.0)
            if call.done():
                _raise_failure(call)
            raise
    finally:
        walking.cancel()
        await asyncio.gather(walking, return_exceptions=True)


def _raise_failure(call: asyncio.Task[None]) -> None:
    if call.cancelled():
        raise FerryError(Reason.VMM_FAILED, "the migration was given up while the VMM was at it")
    call.result()
