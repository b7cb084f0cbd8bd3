"""Lanes over bare sockets: see LaneHello of proto/pageferry/v1/page.proto. What is not about pages goes over gRPC.

A message is received where it stays: the kernel copies it once, into the bytes that are then copied into the guest.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from pageferry import address as addresses
from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_status
from pageferry.tls_sockets import client_context
from pageferry.v1 import page_pb2
from pageferryd.core.frames import HEAD, HEAD_SIZE, MAX_ANSWER, REFUSAL, framed
from pageferryd.core.requests import encode_request
from pageferryd.destination.page_calls import PageCalls, Source, told
from pageferryd.linux.buffers import address_of, uninitialised_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

    from pageferry.tls import TlsFiles
    from pageferryd.destination.lanes import LaneOpener, Lanes

_log = structlog.get_logger(__name__)

_STAGE = 16 << 10
"""Bytes that are received together with the head of a frame: all of the answer to a fault."""
MAX_UNREAD = 64
"""Answers of the demand lane that wait to be taken before the source is read no further."""
MAX_UNREAD_PUSH = 1
"""The same of the push lane: what is read in one go keeps a fault's answer waiting."""
_LANE_SECONDS = 2.0
"""How long the sockets may take before gRPC is used instead."""


class _Lane(asyncio.BufferedProtocol):
    """One connection, seen from the destination."""

    def __init__(self, source: Source, max_unread: int) -> None:
        self._source = source
        self._max_unread = max_unread
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._stage = bytearray(_STAGE)
        self._staged = 0
        self._body = b""
        self._view: memoryview | None = None
        self._filled = 0
        self._refusal = False
        self._messages: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._deliver: Callable[[bytes], None] | None = None
        self._failure: FerryError | None = None

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is connected."""
        # uvloop's is no subclass of it.
        self._transport = cast("asyncio.Transport", transport)
        if self._failure is not None:
            # Given up while it was on its way.
            self._transport.abort()
            return
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give the place of what comes next: the rest of a frame, or the stage for the next head."""
        if self._view is not None:
            return self._view[self._filled :]
        return memoryview(self._stage)[self._staged :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came."""
        try:
            if self._view is not None:
                self._filled += nbytes
                if self._filled == len(self._view):
                    self._finish(self._body)
                return
            self._staged += nbytes
            self._take_stage()
        except FerryError as error:
            self._fail(error)

    def eof_received(self) -> None:
        """The source says nothing more."""

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        why = f": {error}" if error is not None else ""
        self._fail(FerryError(Reason.LANE_LOST, f"{self._source.lane_address} ended a lane{why}"))

    # What the lanes call

    def send(self, message: bytes) -> None:
        """Send a frame."""
        if self._failure is not None or self._transport is None:
            raise _again(self._failure)
        self._transport.write(framed(message))

    async def receive(self) -> bytes:
        """Return the next message."""
        while not self._messages:
            if self._failure is not None:
                raise _again(self._failure)
            self._waiter = self._loop.create_future()
            await self._waiter
        if len(self._messages) == self._max_unread and self._transport is not None:
            self._transport.resume_reading()
        return self._messages.popleft()

    async def deliver(self, deliver: Callable[[bytes], None]) -> None:
        """Have each message delivered as it comes; raise what ends that."""
        self._deliver = deliver
        try:
            while self._messages:
                deliver(self._messages.popleft())
            while self._failure is None:
                self._waiter = self._loop.create_future()
                await self._waiter
        finally:
            self._deliver = None
        raise _again(self._failure)

    def close(self) -> None:
        """Hang up."""
        self._fail(FerryError(Reason.LANE_LOST, f"the lanes to {self._source.lane_address} were closed"))

    # Frames

    def _take_stage(self) -> None:
        """Take the frames that are whole on the stage; one that is not goes on in a place of its own."""
        stage, at = self._stage, 0
        while self._staged - at >= HEAD_SIZE:
            (head,) = HEAD.unpack_from(stage, at)
            size = head & ~REFUSAL
            self._refusal = bool(head & REFUSAL)
            if size > MAX_ANSWER:
                raise FerryError(
                    Reason.MALFORMED_PAGES, f"the source sent a frame of {size} bytes; {MAX_ANSWER} are allowed"
                )
            at += HEAD_SIZE
            here = self._staged - at
            if here < size:
                self._begin(size, stage[at : self._staged])
                at = self._staged
                break
            self._finish(bytes(stage[at : at + size]))
            at += size
        stage[: self._staged - at] = stage[at : self._staged]
        self._staged -= at

    def _begin(self, size: int, start: bytearray) -> None:
        self._body = uninitialised_bytes(size)
        self._view = memoryview((ctypes.c_char * size).from_address(address_of(self._body))).cast("B")
        self._view[: len(start)] = start
        self._filled = len(start)

    def _finish(self, message: bytes) -> None:
        self._view, self._body = None, b""
        if self._refusal:
            raise _refusal(self._source, message)
        if self._deliver is not None:
            self._deliver(message)
            return
        self._messages.append(message)
        if len(self._messages) == self._max_unread and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def _fail(self, error: FerryError) -> None:
        if self._failure is None:
            self._failure = error
            if self._transport is not None:
                self._transport.abort()
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _again(error: FerryError | None) -> FerryError:
    """Return an error to be raised once more, without the frames of the last time."""
    return (
        FerryError(Reason.LANE_LOST, "the lane is not open")
        if error is None
        else FerryError(error.reason, error.message)
    )


def _refusal(source: Source, message: bytes) -> FerryError:
    try:
        status = status_pb2.Status.FromString(message)
    except DecodeError:
        return FerryError(Reason.LANE_LOST, f"{source.lane_address} refuses, and does not say why")
    return told(source, from_status(status, Reason.LANE_LOST))


class SocketLanes:
    """Two connections, and a channel for what is not about pages."""

    def __init__(self, source: Source, tls: TlsFiles | None, channel: grpc.aio.Channel) -> None:
        self.checksums = source.checksums
        self._source = source
        self._tls = tls
        self._channel = channel
        self._calls = PageCalls(source, channel)
        self._demand = _Lane(source, MAX_UNREAD)
        self._push = _Lane(source, MAX_UNREAD_PUSH)

    async def start(self, seconds: float) -> None:
        """Check the layout at the source, then open both lanes. FerryError(SOURCE_UNREACHABLE)."""
        await self._calls.check_layout(seconds)
        try:
            async with asyncio.timeout(min(seconds, _LANE_SECONDS)):
                await asyncio.gather(
                    self._open(self._demand, page_pb2.LANE_DEMAND), self._open(self._push, page_pb2.LANE_PUSH)
                )
        except (OSError, TimeoutError) as error:
            raise FerryError(
                Reason.SOURCE_UNREACHABLE, f"{self._source.lane_address} gives no lanes: {error or 'no answer'}"
            ) from error

    async def fetch(self, runs: Sequence[tuple[int, int]]) -> None:
        """Ask on the demand lane."""
        self._demand.send(encode_request(runs))

    async def fetched(self) -> bytes:
        """Return the next answer of the demand lane."""
        return await self._demand.receive()

    def fetch_now(self, runs: Sequence[tuple[int, int]]) -> None:
        """Ask at once."""
        self._demand.send(encode_request(runs))

    async def deliver_fetched(self, deliver: Callable[[bytes], None]) -> None:
        """Deliver each answer of the demand lane as it comes."""
        await self._demand.deliver(deliver)

    async def push(self, runs: Sequence[tuple[int, int]], credit: int) -> None:
        """Ask on the push lane."""
        self._push.send(encode_request(runs, credit))

    async def pushed(self) -> bytes:
        """Return the next answer of the push lane."""
        return await self._push.receive()

    async def export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        """Ask over gRPC."""
        return await self._calls.export(pages)

    async def complete(self, pages: int) -> None:
        """Tell the source over gRPC."""
        await self._calls.complete(pages)

    async def close(self) -> None:
        """Hang up all three."""
        self._demand.close()
        self._push.close()
        await self._channel.close()
        self._calls.let_go()

    async def _open(self, lane: _Lane, which: page_pb2.Lane.ValueType) -> None:
        address, name = self._source.lane_address, self._source.name
        loop = asyncio.get_running_loop()
        secured: dict[str, Any] = {}
        if self._tls is not None:
            secured = {"ssl": client_context(self._tls), "server_hostname": name}
        if addresses.is_unix(address):
            await loop.create_unix_connection(lambda: lane, address.removeprefix(addresses.UNIX_PREFIX), **secured)
        else:
            host, port = addresses.split(address)
            await loop.create_connection(lambda: lane, host, int(port), **secured)
        hello = page_pb2.LaneHello(migration_id=self._source.migration_id, token=self._source.token, lane=which)
        lane.send(hello.SerializeToString())
        await lane.receive()


class SocketLaneOpener:
    """Opens lanes over sockets, or with `instead` where those cannot be reached, as behind a firewall."""

    def __init__(self, source: Source, tls: TlsFiles | None, seconds: float, instead: LaneOpener) -> None:
        self._source = source
        self._tls = tls
        self._seconds = seconds
        self._instead = instead

    async def open(self) -> Lanes:
        """Connect. FerryError as LaneOpener says."""
        lanes = SocketLanes(self._source, self._tls, open_channel(self._source.address, self._tls, self._source.name))
        try:
            await lanes.start(self._seconds)
        except FerryError as error:
            await lanes.close()
            if error.reason not in (Reason.SOURCE_UNREACHABLE, Reason.LANE_LOST):
                raise
            # Where nobody answers at all, this says so once more.
            other = await self._instead.open()
            _log.warning("lane_sockets_unreachable", address=self._source.lane_address, detail=error.message)
            return other
        except BaseException:
            await lanes.close()
            raise
        return lanes
