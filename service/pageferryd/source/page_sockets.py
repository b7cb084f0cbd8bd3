"""Both lanes over bare sockets, beside the page service: see LaneHello of proto/pageferry/v1/page.proto.

One event loop serves all of it, and the push lane gives way after each message; while faults come also between the
collecting and the sending of one. So a fault waits for one of these at most.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import TYPE_CHECKING, cast

import structlog
from google.protobuf.message import DecodeError

from pageferry.errors import FerryError, Reason, to_status
from pageferry.tls_sockets import proved_names
from pageferry.v1 import page_pb2
from pageferryd.core.errors import CoreError
from pageferryd.core.frames import HEAD, RequestFrames, framed, refusal
from pageferryd.core.pacing import FAULTS_COME_SECONDS
from pageferryd.core.requests import decode_fetch, decode_push
from pageferryd.source.answers import PushAnswer, fetch, misbehaviour

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.core.requests import Request
    from pageferryd.source.served import Served

    Authorise = Callable[[page_pb2.LaneHello, frozenset[str]], Served]

_log = structlog.get_logger(__name__)

HELLO_SECONDS = 5.0
"""How long a caller may take to say who it is."""
MAX_REQUESTS = 1024
"""Most requests of one lane that wait to be answered."""
_FETCHES_AT_ONCE = 16
"""Answers of a demand lane, of 2 MiB at most, before other lanes have their turn."""
_HIGH_WATER = 1 << 20
"""Bytes of answers that a destination may leave unread before it is answered no further."""


class PageLane(asyncio.Protocol):
    """One connection. `authorise` returns the memory that a hello asks for, or raises FerryError."""

    def __init__(self, authorise: Authorise, gone: Callable[[PageLane], None]) -> None:
        self._authorise = authorise
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._frames = RequestFrames()
        self._transport: asyncio.Transport
        self._served: Served | None = None
        self._pushes = False
        self._requests: deque[Request] = deque()
        self._answer: PushAnswer | None = None
        self._collected: list[bytes | memoryview] | None = None
        self._pumping = False
        self._may_write = True
        self._deadline = self._loop.call_later(HELLO_SECONDS, self._never_said)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected."""
        # uvloop's is no subclass of it.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A destination that vanished without a word owes nothing: only the kernel can find that out.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)

    def data_received(self, data: bytes) -> None:
        """Requests, or the hello before them."""
        try:
            for frame in self._frames.take(data):
                if self._served is None:
                    self._hello(frame)
                else:
                    self._ask(frame)
        except Exception as error:
            self._refuse(error)

    def pause_writing(self) -> None:
        """The destination does not read: take no more of its requests."""
        self._may_write = False
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._may_write = True
        self._transport.resume_reading()
        self._pump_soon()

    def connection_lost(self, error: Exception | None) -> None:
        """It has gone; that says nothing about the memory."""
        self._deadline.cancel()
        self._requests.clear()
        self._answer = self._collected = None
        self._gone(self)

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    def _never_said(self) -> None:
        self._refuse(FerryError(Reason.TOKEN_INVALID, f"no hello came within {HELLO_SECONDS:g} s"))

    def _hello(self, frame: bytes) -> None:
        try:
            hello = page_pb2.LaneHello.FromString(frame)
        except DecodeError as error:
            raise FerryError(Reason.INVALID_ARGUMENT, "a connection for pages does not begin with a hello") from error
        if hello.lane not in (page_pb2.LANE_DEMAND, page_pb2.LANE_PUSH):
            raise FerryError(Reason.INVALID_ARGUMENT, f"there is no lane {hello.lane}")
        connection = self._transport.get_extra_info("ssl_object")
        names = proved_names(connection) if connection is not None else frozenset[str]()
        self._served = self._authorise(hello, names)
        self._pushes = hello.lane == page_pb2.LANE_PUSH
        self._deadline.cancel()
        self._transport.write(framed(b""))

    def _ask(self, frame: bytes) -> None:
        if len(self._requests) >= MAX_REQUESTS:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{MAX_REQUESTS} requests of one lane wait already")
        self._requests.append(decode_push(frame) if self._pushes else decode_fetch(frame))
        if not self._pushes:
            self._answer_fetches()
        self._pump_soon()

    def _answer_fetches(self) -> None:
        """Answer at once, but no more than the destination reads, and not so many that others wait."""
        for _ in range(_FETCHES_AT_ONCE):
            if self._served is None or not self._requests or not self._may_write:
                return
            self._served.fetched_at = self._loop.time()
            self._send(fetch(self._served, self._requests.popleft()))

    def _pump_soon(self) -> None:
        more = self._requests or self._answer is not None or self._collected is not None
        if not self._pumping and self._may_write and more:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Send one message of the push lane, or some answers, and let everybody else have their turn."""
        self._pumping = False
        if self._served is None or self._transport.is_closing():
            return
        try:
            if not self._pushes:
                self._answer_fetches()
            elif self._answer is None and self._requests:
                self._answer = PushAnswer(self._served, self._requests.popleft())
            if self._collected is not None:
                collected, self._collected = self._collected, None
                self._send(collected)
            elif self._answer is not None:
                self._push_some(self._answer, self._served)
        except Exception as error:
            self._refuse(error)
        else:
            self._pump_soon()

    def _push_some(self, answer: PushAnswer, served: Served) -> None:
        part = answer.next_part()
        if answer.ended:
            self._answer = None
        if part is not None and self._loop.time() - served.fetched_at < FAULTS_COME_SECONDS:
            # A fault that came while this was collected goes first.
            self._collected = part
        elif part is not None:
            self._send(part)

    def _send(self, parts: list[bytes | memoryview]) -> None:
        self._transport.writelines([HEAD.pack(sum(map(len, parts))), *parts])

    def _refuse(self, error: Exception) -> None:
        """Say why, and hang up."""
        if isinstance(error, CoreError):
            error = misbehaviour(error)
        if not isinstance(error, FerryError):
            _log.error("page_lane_broke", detail=f"{type(error).__name__}: {error}")
            error = FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
        self._requests.clear()
        self._answer = self._collected = None
        if not self._transport.is_closing():
            self._transport.write(refusal(to_status(error).SerializeToString()))
            self._transport.close()
