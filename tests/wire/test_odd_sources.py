"""Sources that answer as no source does, on the way to open lanes: an error with a reason each, and nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from pageferry.errors import FerryError, Reason, to_status
from pageferry.v1 import memory_pb2, page_pb2
from pageferryd.core.frames import framed, refusal
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.grpc_lanes import GrpcLaneOpener
from pageferryd.destination.page_calls import Source
from pageferryd.destination.socket_lanes import MAX_UNREAD, SocketLaneOpener, _Lane

LAYOUT = Layout([Region(0, 4 * PAGE_SIZE)])
SOURCE = Source("m", "127.0.0.1:1", "source", b"t" * 32, LAYOUT, "127.0.0.1:1")
SECONDS = 1.0
DEADLINE = 20.0
DETAILS = "grpc-status-details-bin"
GetLayout = Callable[[bytes, Any], Awaitable[bytes]]


@asynccontextmanager
async def odd(answer: GetLayout) -> AsyncIterator[str]:
    """A server whose page service tells the layout in an odd way."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("pageferry.v1.PageService", {"GetLayout": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def reason_of(awaitable: Awaitable[object]) -> Reason:
    with pytest.raises(FerryError) as refused:
        await asyncio.wait_for(awaitable, DEADLINE)
    return refused.value.reason


def over_grpc(address: str) -> GrpcLaneOpener:
    return GrpcLaneOpener(Source("m", address, "source", b"t" * 32, LAYOUT), None, SECONDS)


def failing(details: bytes) -> GetLayout:
    async def answer(_request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(((DETAILS, details),))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it is odd")
        return b""

    return answer


def _wrong_inside() -> bytes:
    status = to_status(FerryError(Reason.ILLEGAL_STATE, "it is odd"))
    status.details[0].value = b"\xff\xff"
    return status.SerializeToString()


@pytest.mark.parametrize(
    "details",
    [b"\xff\xff", _wrong_inside(), status_pb2.Status(code=5, message="another").SerializeToString()],
    ids=["no status", "no reason in it", "another code"],
)
async def test_a_source_whose_status_cannot_be_read_is_an_error_with_a_reason(details: bytes) -> None:
    """Anything but a FerryError would end the session, and with it the guest's only hope for its pages."""
    async with odd(failing(details)) as address:
        assert await reason_of(over_grpc(address).open()) in Reason


async def test_a_source_that_never_tells_its_layout_is_not_waited_for() -> None:
    async def never(_request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(DEADLINE)
        return b""

    async with odd(never) as address:
        assert await reason_of(over_grpc(address).open()) is Reason.SOURCE_UNREACHABLE


@asynccontextmanager
async def saying(data: bytes) -> AsyncIterator[tuple[str, list[asyncio.StreamReader]]]:
    """A source whose lanes say that to whoever connects, and no more; yields its readers, too."""
    callers: list[asyncio.StreamReader] = []
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(reader)
        writers.append(writer)
        writer.write(data)

    async def layout(_request: bytes, _context: Any) -> bytes:
        region = memory_pb2.MemoryRegion(guest_address=0, size=4 * PAGE_SIZE, page_size=PAGE_SIZE)
        told = memory_pb2.MemoryLayout(regions=[region])
        return page_pb2.GetLayoutResponse(layout=told).SerializeToString()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with odd(layout) as address, server:
        host, port = server.sockets[0].getsockname()
        yield f"{address} {host}:{port}", callers
        for writer in writers:
            writer.transport.abort()


class NoOther:
    async def open(self) -> Any:
        raise FerryError(Reason.SOURCE_UNREACHABLE, "there is no other way")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", Reason.SOURCE_UNREACHABLE),
        (framed(b"")[:3], Reason.SOURCE_UNREACHABLE),
        (b"\xff\xff\xff\x7f", Reason.MALFORMED_PAGES),
        (refusal(b""), Reason.SOURCE_UNREACHABLE),
        (refusal(b"\xff\xff"), Reason.SOURCE_UNREACHABLE),
        (refusal(to_status(FerryError(Reason.TOKEN_INVALID, "no")).SerializeToString()), Reason.TOKEN_INVALID),
    ],
    ids=["nothing", "part of a frame", "too much", "an empty refusal", "a refusal of nonsense", "a refusal"],
)
async def test_lanes_that_do_not_welcome_are_given_up(said: bytes, reason: Reason) -> None:
    async with saying(said) as (both, callers):
        address, _, lanes = both.partition(" ")
        opener = SocketLaneOpener(Source("m", address, "source", b"t" * 32, LAYOUT, lanes), None, SECONDS, NoOther())
        assert await reason_of(opener.open()) is reason
        for caller in callers:
            # Each is hung up on, after its hello.
            async with asyncio.timeout(DEADLINE):
                with suppress(OSError):
                    await caller.read()


class Transport:
    """Notes whether it was let go."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    def get_extra_info(self, _name: str) -> None:
        return None


async def test_a_connection_that_is_made_after_its_lane_was_given_up_is_let_go() -> None:
    """When one of two lanes fails, the other may still be on its way: nobody would close it."""
    lane, transport = _Lane(SOURCE, MAX_UNREAD), Transport()
    lane.close()
    lane.connection_made(transport)  # type: ignore[arg-type]
    assert transport.aborted
