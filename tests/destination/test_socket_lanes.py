"""Lanes over bare sockets to a real page service: over TCP and Unix sockets, with and without TLS, through a proxy."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from grpc_link import TOKEN, GrpcLink
from guarded import content
from lanes_conformance import DEADLINE, PAGES, LanesConformance, reason_of, soon
from stream_proxy import StreamProxy

from certificates import Authority
from pageferry.errors import Reason
from pageferry.tls_sockets import client_context
from pageferry.v1 import page_pb2
from pageferryd.config import Settings, Tls
from pageferryd.control.lane_server import LaneServer
from pageferryd.core.frames import MAX_REQUEST, REFUSAL, framed
from pageferryd.core.requests import encode_request
from pageferryd.core.runs import RAW, Run, decode
from pageferryd.destination.grpc_lanes import GrpcLanes
from pageferryd.destination.socket_lanes import SocketLaneOpener, SocketLanes
from pageferryd.source import page_sockets


class SocketLink(GrpcLink):
    """A source in this process that serves lanes beside gRPC."""

    async def start(self) -> None:
        await super().start()
        self.server = LaneServer(self.settings, self.pages)
        await self.server.start(self.bound, self.bound)
        self.lane_proxy = await StreamProxy(self.server.address, self.directory / "lanes").__aenter__()

    async def stop(self) -> None:
        await super().stop()
        await self.lane_proxy.__aexit__()

    def opener(self, **given: object) -> SocketLaneOpener:
        over_grpc = super().opener(**given)  # type: ignore[arg-type]
        source = replace(over_grpc._source, lane_address=self.lane_proxy.address)
        return SocketLaneOpener(source, over_grpc._tls, 5.0, over_grpc)

    async def cut(self) -> None:
        await super().cut()
        self.lane_proxy.cut()

    async def heal(self) -> None:
        await super().heal()
        self.lane_proxy.heal()

    async def stop_source(self) -> None:
        await self.server.stop()
        await super().stop_source()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(params=["tcp", "unix", "tcp, TLS", "unix, TLS"])
async def link(request: pytest.FixtureRequest, short_dir: Path, authority: Authority) -> AsyncIterator[SocketLink]:
    (short_dir / "lanes").mkdir()
    listen = "127.0.0.1:0" if request.param.startswith("tcp") else f"unix:{short_dir}/s"
    secure = request.param.endswith("TLS")
    given: dict[str, object] = {"insecure": True}
    if secure:
        files = authority.write(short_dir / "source", "source")
        given = {"tls": Tls(ca=files.ca, certificate=files.certificate, key=files.key)}
    settings = Settings(host="source", listen=[listen], **given)  # type: ignore[arg-type]
    one = SocketLink(settings, authority if secure else None, short_dir)
    await one.start()
    yield one
    await one.stop()


class TestSocketLanes(LanesConformance):
    """Passes what all lanes must."""


async def test_sockets_are_used_where_they_are_reached(link: SocketLink) -> None:
    lanes = await link.opener().open()
    assert isinstance(lanes, SocketLanes)
    await lanes.close()


async def test_grpc_is_used_where_they_are_not(link: SocketLink) -> None:
    link.lane_proxy.cut()
    lanes = await link.opener().open()
    assert isinstance(lanes, GrpcLanes)
    await lanes.fetch([(3, 1)])
    assert decode(await soon(lanes.fetched())).runs == [Run(3, 1, RAW)]
    await lanes.close()


class Caller:
    """Somebody who speaks to the lane server by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def at(cls, link: SocketLink) -> Caller:
        address = link.server.address
        tls = link.files("destination")
        secured = {} if tls is None else {"ssl": client_context(tls), "server_hostname": "source"}
        if address.startswith("unix:"):
            return cls(*await asyncio.open_unix_connection(address.removeprefix("unix:"), **secured))
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), **secured))

    def say(self, message: bytes) -> None:
        self.writer.write(framed(message))

    def hello(self, lane: page_pb2.Lane.ValueType = page_pb2.LANE_DEMAND, token: bytes = TOKEN) -> None:
        self.say(page_pb2.LaneHello(migration_id="m", token=token, lane=lane).SerializeToString())

    async def frame(self) -> tuple[int, bytes]:
        async with asyncio.timeout(DEADLINE):
            (head,) = struct.unpack("<I", await self.reader.readexactly(4))
            return head, await self.reader.readexactly(head & ~REFUSAL)

    async def refused(self) -> bytes:
        """The next frame refuses, and nothing follows."""
        head, message = await self.frame()
        assert head & REFUSAL
        assert await asyncio.wait_for(self.reader.read(), DEADLINE) == b""
        return message

    def close(self) -> None:
        self.writer.transport.abort()


@pytest.fixture
async def caller(link: SocketLink) -> AsyncIterator[Caller]:
    made = await Caller.at(link)
    yield made
    made.close()


async def test_a_fault_is_answered_frame_by_frame(caller: Caller) -> None:
    caller.hello()
    assert await caller.frame() == (0, b"")
    caller.say(encode_request([(5, 1)]))
    _, message = await caller.frame()
    batch = decode(message)
    assert (batch.runs, message[batch.offset :]) == ([Run(5, 1, RAW)], content(5))


@pytest.mark.parametrize("token", [b"", bytes(32)])
async def test_who_does_not_know_the_secret_is_refused(caller: Caller, token: bytes) -> None:
    caller.hello(token=token)
    assert b"TOKEN_INVALID" in await caller.refused()


@pytest.mark.parametrize("hello", [b"", b"\xff\xff", b"\x18\x07"], ids=["empty", "garbage", "no lane"])
async def test_what_is_no_hello_is_refused(caller: Caller, hello: bytes) -> None:
    caller.say(hello)
    await caller.refused()


async def test_a_frame_that_is_too_long_is_refused_before_it_comes(caller: Caller) -> None:
    caller.writer.write(struct.pack("<I", MAX_REQUEST + 1))
    assert b"MALFORMED_PAGES" in await caller.refused()


@pytest.mark.parametrize("lane", [page_pb2.LANE_DEMAND, page_pb2.LANE_PUSH])
async def test_a_request_that_cannot_be_is_refused(caller: Caller, lane: page_pb2.Lane.ValueType) -> None:
    caller.hello(lane)
    await caller.frame()
    caller.say(b"nonsense")
    assert b"MALFORMED_PAGES" in await caller.refused()


async def test_pages_outside_the_guest_are_refused(caller: Caller) -> None:
    caller.hello()
    await caller.frame()
    caller.say(encode_request([(PAGES, 1)]))
    assert b"PAGE_OUT_OF_RANGE" in await caller.refused()


async def test_more_push_requests_than_wait_at_once_are_refused(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_sockets, "MAX_REQUESTS", 2)
    caller.hello(page_pb2.LANE_PUSH)
    await caller.frame()
    caller.writer.write(b"".join(framed(encode_request([(0, PAGES)], 1 << 20)) for _ in range(8)))
    while not (await caller.frame())[0] & REFUSAL:
        pass


async def test_who_says_nothing_is_hung_up_on(link: SocketLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_sockets, "HELLO_SECONDS", 0.05)
    caller = await Caller.at(link)
    await caller.refused()
    caller.close()


async def test_a_source_with_another_name_is_not_talked_to(link: SocketLink) -> None:
    if link.files("destination") is None:
        pytest.skip("without certificates nobody proves a name")
    opener = link.opener()
    opener._source = replace(opener._source, name="impostor")
    opener._instead._source = opener._source
    assert await reason_of(opener.open()) is Reason.SOURCE_UNREACHABLE
