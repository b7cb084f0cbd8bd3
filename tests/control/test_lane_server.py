"""The lane server among strangers: who is refused and counted, and that nobody keeps a peer from its pages."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from certificates import Authority
from pageferry.errors import Reason
from pageferry.tls import TlsFiles
from pageferry.tls_sockets import RenewedContext, client_context
from pageferry.v1 import memory_pb2, page_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.access import make_refusals
from pageferryd.config import Settings, Tls
from pageferryd.control.lane_server import LaneServer
from pageferryd.control.lane_visits import MAX_OF_ONE, MAX_UNPROVED
from pageferryd.core.frames import REFUSAL, framed
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.requests import encode_request
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Served

pytestmark = [pytest.mark.root, pytest.mark.timeout(30)]
TOKEN = bytes(range(32))
PAGES = 512
DEADLINE = 8.0


async def until(condition: Callable[[], object]) -> None:
    for _ in range(int(DEADLINE / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")


class Source:
    """A host that serves one guest of PAGES pages, migration "m", to the host "west"."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory, self.authority = directory, authority
        self.memory = GuestMemory(PAGES * PAGE_SIZE)
        self.memory.write(0, b"its page")
        self.files = authority.write(directory / "source", "east")
        tls = Tls(ca=self.files.ca, certificate=self.files.certificate, key=self.files.key)
        settings = Settings(host="east", listen=["127.0.0.1:0"], peers=["west", "north"], tls=tls)
        layout = Layout([Region(0, PAGES * PAGE_SIZE)])
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self.memory.address))
        served = Served("m", TOKEN, "west", SourceMemory.open(layout, [location], os.getpid()), layout, lambda: None)
        served.open()
        self.served = served
        self.pages = PageService(secure=True)
        self.pages.offer(served)
        self.refusals = make_refusals()
        self.server = LaneServer(settings, self.pages, self.refusals)
        self._open = AsyncExitStack()

    async def connect(self, context: ssl.SSLContext | None) -> Lane:
        host, _, port = self.server.address.rpartition(":")
        secured = {} if context is None else {"ssl": context, "server_hostname": "east"}
        lane = Lane(*await asyncio.open_connection(host, int(port), **secured))
        self._open.push_async_callback(lane.close)
        return lane

    def certificate(self, name: str, authority: Authority | None = None) -> TlsFiles:
        return (authority or self.authority).write(self.directory / f"client-{name}", name)

    async def peer(self, name: str = "west") -> Lane:
        return await self.connect(client_context(self.certificate(name)))

    async def noted(self, reason: Reason) -> None:
        """Wait until a refusal was counted."""
        await until(lambda: self.refusals.counts["lane", reason])

    async def stop(self) -> None:
        await self._open.aclose()
        await self.server.stop()
        self.pages.withdraw("m")
        self.memory.close()


class Lane:
    """The other end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def hello(self, migration_id: str = "m", token: bytes = TOKEN) -> None:
        hello = page_pb2.LaneHello(migration_id=migration_id, token=token, lane=page_pb2.LANE_DEMAND)
        self.writer.write(framed(hello.SerializeToString()))

    async def frame(self) -> tuple[int, bytes]:
        async with asyncio.timeout(DEADLINE):
            (head,) = struct.unpack("<I", await self.reader.readexactly(4))
            return head, await self.reader.readexactly(head & ~REFUSAL)

    async def is_let_in(self) -> None:
        self.hello()
        assert await self.frame() == (0, b"")

    async def gives_the_page(self) -> None:
        self.writer.write(framed(encode_request([(0, 1)])))
        head, message = await self.frame()
        assert not head & REFUSAL
        assert b"its page" in message

    async def close(self) -> None:
        self.writer.close()
        self.writer.transport.abort()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def ended(self) -> bytes:
        """Wait until it is hung up; return what came before."""
        try:
            return await asyncio.wait_for(self.reader.read(), DEADLINE)
        except (ConnectionResetError, ssl.SSLError):
            return b""


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def source(tmp_path: Path, authority: Authority) -> AsyncIterator[Source]:
    one = Source(tmp_path, authority)
    await one.server.start("127.0.0.1:1", "127.0.0.1:1")
    yield one
    await one.stop()


Intrude = Callable[[Source], Awaitable[bytes]]


async def with_another_ca(source: Source) -> bytes:
    files = source.certificate("west", Authority("another CA"))
    # It trusts the source, so that only the source can refuse.
    files.ca.write_bytes(source.authority.certificate)
    return await in_vain(source, client_context(files))


async def with_an_expired_certificate(source: Source) -> bytes:
    return await in_vain(source, client_context(source.authority.write(source.directory / "old", "west", expired=True)))


async def without_a_certificate(source: Source) -> bytes:
    return await in_vain(source, ssl.create_default_context(cadata=source.authority.certificate.decode()))


async def without_tls(source: Source) -> bytes:
    return await in_vain(source, None)


async def in_vain(source: Source, context: ssl.SSLContext | None) -> bytes:
    """Try to get in where that must fail before anything is said."""
    try:
        lane = await source.connect(context)
        lane.hello()
        return await lane.ended()
    except (ConnectionResetError, ssl.SSLError):
        return b""


async def as_no_peer(source: Source) -> bytes:
    return await refused_as("mallory", source)


async def as_another_peer(source: Source) -> bytes:
    return await refused_as("north", source)


async def with_another_token(source: Source) -> bytes:
    return await refused_as("west", source, token=bytes(32))


async def for_another_migration(source: Source) -> bytes:
    return await refused_as("west", source, migration_id="another")


async def refused_as(name: str, source: Source, migration_id: str = "m", token: bytes = TOKEN) -> bytes:
    lane = await source.peer(name)
    lane.hello(migration_id, token)
    head, message = await lane.frame()
    assert head & REFUSAL
    assert await lane.ended() == b""
    return message


@pytest.mark.parametrize(
    ("intrude", "reason"),
    [
        (with_another_ca, Reason.PEER_NOT_ALLOWED),
        (with_an_expired_certificate, Reason.PEER_NOT_ALLOWED),
        (without_a_certificate, Reason.PEER_NOT_ALLOWED),
        (without_tls, Reason.PEER_NOT_ALLOWED),
        (as_no_peer, Reason.PEER_NOT_ALLOWED),
        (as_another_peer, Reason.PEER_NOT_ALLOWED),
        (with_another_token, Reason.TOKEN_INVALID),
        (for_another_migration, Reason.UNKNOWN_MIGRATION),
    ],
)
async def test_a_stranger_gets_no_page_and_is_counted(source: Source, intrude: Intrude, reason: Reason) -> None:
    told = await intrude(source)
    assert b"its page" not in told
    if told:
        assert reason.encode() in told or told.startswith(b"\x15")
    await source.noted(reason)
    assert source.refusals.counts == {("lane", reason): 1}
    lane = await source.peer()
    await lane.is_let_in()
    await lane.gives_the_page()


async def test_a_flood_of_connections_that_say_nothing_keeps_no_peer_out(source: Source) -> None:
    """They are hung up on to make room, long before their time is up."""
    lane = await source.peer()
    await lane.is_let_in()
    for _ in range(3 * MAX_UNPROVED):
        await source.connect(None)
    newcomer = await source.peer()
    await newcomer.is_let_in()
    await newcomer.gives_the_page()
    await lane.gives_the_page()
    assert len(source.server._visits) <= MAX_UNPROVED + 2
    await source.noted(Reason.LANE_SILENT)


async def test_a_migration_has_a_bounded_number_of_lanes_of_which_the_newest_work(source: Source) -> None:
    context = client_context(source.certificate("west"))
    lanes = [await source.connect(context) for _ in range(2 * MAX_OF_ONE)]
    for lane in lanes:
        await lane.is_let_in()
    for old in lanes[:MAX_OF_ONE]:
        await old.ended()
    for new in lanes[MAX_OF_ONE:]:
        await new.gives_the_page()
    assert len(source.server._visits) == MAX_OF_ONE


async def test_a_handshake_that_failed_leaves_nothing_behind(source: Source) -> None:
    for _ in range(5):
        await without_tls(source)
    await source.noted(Reason.PEER_NOT_ALLOWED)
    await until(lambda: not len(source.server._visits) and not source.server._handshakes)


async def test_a_ca_that_was_replaced_refuses_the_old_certificates_from_then_on(source: Source) -> None:
    old = client_context(source.certificate("west"))
    lane = await source.connect(old)
    await lane.is_let_in()

    newer = Authority("the next CA")
    newer.write(source.directory / "source", "east")
    # Still trusting the source, whose certificate is of the next CA by now.
    old.load_verify_locations(cadata=newer.certificate.decode())
    assert await in_vain(source, old) in (b"", b"\x15")
    await source.noted(Reason.PEER_NOT_ALLOWED)
    renewed = await source.connect(client_context(source.certificate("west", newer)))
    await renewed.is_let_in()
    # A connection that exists keeps what it began with.
    await lane.gives_the_page()


async def test_half_of_a_renewal_keeps_the_old_certificates_in_use(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    source.files.key.write_bytes(source.authority.issue("east").key)
    lane = await source.peer()
    await lane.is_let_in()
    assert "keeping the last good ones" in caplog.text


def test_files_are_read_only_when_they_have_changed(tmp_path: Path, authority: Authority) -> None:
    files = authority.write(tmp_path, "east")
    context = RenewedContext(files)
    first = context.now()
    assert context.now() is first
    authority.write(tmp_path, "east")
    assert context.now() is not first


async def test_no_session_can_be_taken_up_again_without_showing_the_certificate(source: Source) -> None:
    context = client_context(source.certificate("west"))
    host, _, port = source.server.address.rpartition(":")

    def visit() -> ssl.SSLSession | None:
        """Get in, and read once: tickets come with the first bytes."""
        with (
            socket.create_connection((host, int(port)), DEADLINE) as plain,
            context.wrap_socket(plain, server_hostname="east") as secured,
        ):
            hello = page_pb2.LaneHello(migration_id="m", token=TOKEN, lane=page_pb2.LANE_DEMAND)
            secured.sendall(framed(hello.SerializeToString()))
            assert secured.recv(4) == bytes(4)
            return secured.session

    session = await asyncio.to_thread(visit)
    assert session is None or not session.has_ticket
    # Earlier versions have sessions without tickets.
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        await asyncio.to_thread(visit)


async def test_a_peer_that_asks_for_pages_and_reads_none_is_not_answered_for_ever(source: Source) -> None:
    """A request takes 22 bytes, its answer 2 MiB: unread, they must not pile up here."""
    source.memory.write(0, b"its page" * (PAGES * PAGE_SIZE // 8))
    greedy = await source.peer()
    await greedy.is_let_in()
    greedy.writer.transport.pause_reading()
    greedy.writer.write(framed(encode_request([(0, PAGES)])) * 200)
    await until(lambda: source.served.bytes["demand"])
    lane = await source.peer()
    await lane.is_let_in()
    await lane.gives_the_page()
    assert source.served.bytes["demand"] < 64 << 20
