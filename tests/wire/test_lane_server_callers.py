"""Who calls at a lane server and never gets to the point: each is hung up on in time, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wire_proxy import Way, Wire, WireProxy

from certificates import Authority
from pageferry.tls_sockets import client_context
from pageferry.v1 import page_pb2
from pageferryd.config import Settings, Tls
from pageferryd.control import lane_server
from pageferryd.control.lane_server import LaneServer
from pageferryd.core.frames import framed
from pageferryd.source import page_sockets
from pageferryd.source.page_service import PageService
from pageferryd.source.page_sockets import PageLane

DEADLINE = 10.0
PATIENCE = 0.3
HELLO = framed(page_pb2.LaneHello(migration_id="m", token=b"t" * 32, lane=page_pb2.LANE_PUSH).SerializeToString())


class Served:
    """A lane server that is patient for a moment only, and what its loop was told of broken callbacks."""

    def __init__(self, directory: Path, *, secure: bool) -> None:
        self.authority = Authority() if secure else None
        self.directory = directory
        given: dict[str, Any] = {"insecure": True}
        if self.authority is not None:
            files = self.authority.write(directory / "source", "source")
            given = {"tls": Tls(ca=files.ca, certificate=files.certificate, key=files.key)}
        settings = Settings(host="source", listen=["127.0.0.1:0"], **given)
        self.server = LaneServer(settings, PageService(secure=secure))
        self.broken: list[dict[str, Any]] = []

    async def start(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: self.broken.append(context))
        await self.server.start("127.0.0.1:1", "127.0.0.1:65535")

    async def call(self, address: str = "", **secured: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = (address or self.server.address).rpartition(":")
        return await asyncio.open_connection(host, int(port), **secured)


@pytest.fixture(params=["plain", "TLS"])
async def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    monkeypatch.setattr(page_sockets, "HELLO_SECONDS", PATIENCE)
    monkeypatch.setattr(lane_server, "_HANDSHAKE_SECONDS", PATIENCE)
    one = Served(tmp_path, secure=request.param == "TLS")
    await one.start()
    yield one
    await asyncio.wait_for(one.server.stop(), DEADLINE)


def lanes_alive() -> int:
    gc.collect()
    return sum(isinstance(one, PageLane) for one in gc.get_objects())


async def until_ended(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass


async def ends_cleanly(served: Served) -> None:
    """Nothing is kept of a caller that has gone, and nothing broke."""
    async with asyncio.timeout(DEADLINE):
        # The listener has its last caller in hand until the next one comes.
        while lanes_alive() > 1:  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(PATIENCE / 3)
    # A timer that was left behind would have gone off by now.
    await asyncio.sleep(2 * PATIENCE)
    assert served.broken == []
    await asyncio.wait_for(served.server.stop(), DEADLINE)


@pytest.mark.parametrize("said", [b"", HELLO[:3], b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"])
async def test_who_says_nothing_more_is_hung_up_on(served: Served, said: bytes) -> None:
    reader, writer = await served.call()
    writer.write(said)
    await until_ended(reader)
    writer.transport.abort()
    await ends_cleanly(served)


async def test_who_says_a_byte_now_and_then_is_hung_up_on(served: Served) -> None:
    reader, writer = await served.call()
    # As TLS begins, and as a frame of 64 KiB.
    said = b"\x16\x03\x01\x02\x00" if served.authority is not None else b"\xff\xff\x00\x00"

    async def drip() -> None:
        for number in said + bytes(1000):
            writer.write(bytes([number]))
            await asyncio.sleep(PATIENCE / 6)

    dripping = asyncio.create_task(drip())
    await until_ended(reader)
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    writer.transport.abort()
    await ends_cleanly(served)


async def test_a_handshake_that_drips_through_the_wire_is_ended(served: Served) -> None:
    if served.authority is None:
        pytest.skip("there is no handshake without certificates")
    context = client_context(served.authority.write(served.directory / "d", "destination"))
    with WireProxy() as wire:
        address = wire.to(served.server.address)
        wire.becomes(Wire.DRIPS, Way.UP)
        with pytest.raises((OSError, TimeoutError)):
            async with asyncio.timeout(DEADLINE):
                await served.call(address, ssl=context, server_hostname="source")
    await ends_cleanly(served)


async def test_who_hangs_up_in_a_handshake_leaves_nothing(served: Served) -> None:
    before = lanes_alive()
    assert before <= 1
    for _ in range(20):
        _reader, writer = await served.call()
        writer.write(b"\x16\x03\x01")
        writer.transport.abort()
    await ends_cleanly(served)


async def test_the_server_stops_while_somebody_shakes_hands(served: Served) -> None:
    reader, writer = await served.call()
    writer.write(b"\x16\x03\x01")
    await asyncio.sleep(PATIENCE / 6)
    await asyncio.wait_for(served.server.stop(), DEADLINE)
    await until_ended(reader)
    writer.transport.abort()
    assert served.broken == []


async def test_a_destination_that_vanished_without_a_word_is_found_out_by_the_kernel(tmp_path: Path) -> None:
    """Its lanes owe the source nothing: without the kernel's probes they would stay for ever."""
    connected: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

    class Watched(PageLane):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            connected.set_result(transport.get_extra_info("socket"))

    def authorise(*_: object) -> Any:
        raise AssertionError("nobody says hello")

    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Watched(authorise, lambda _lane: None), "127.0.0.1", 0)
    async with listening:
        _reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        try:
            lane = await asyncio.wait_for(connected, DEADLINE)
            assert lane.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert 0 < lane.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000
        finally:
            writer.transport.abort()
