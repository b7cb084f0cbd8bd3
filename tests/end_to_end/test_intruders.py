"""Strangers, peers that want more than their share, other users and hostile VMMs: refused, while guests cross."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from child import DEADLINE
from crossing import POSTCOPY, PREPARING, STAY, Crossing, Stage, until
from sidecar_process import Sidecar

from certificates import Authority
from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.tls import TlsFiles
from pageferry.tls_sockets import client_context
from pageferry.v1 import incoming_pb2, incoming_pb2_grpc, migration_pb2_grpc, page_pb2, page_pb2_grpc
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]
MIB = 1 << 20
NOBODY = 65534


class Border:
    """Two hosts that prove their names, a third that is a peer of both, and a guest on its way from east to west."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()
        self.lanes = free_address()
        self.channels: list[grpc.aio.Channel] = []

    def files(
        self, name: str, authority: Authority | None = None, *, names: tuple[str, ...] = (), expired: bool = False
    ) -> TlsFiles:
        return (authority or self.authority).write(self.directory / f"tls-{name}", *names or (name,), expired=expired)

    async def open(self, stage: Stage) -> None:
        settings: dict[str, Any] = {"operators": ["ops"], "viewers": ["watcher"], "peers": ["east", "west", "north"]}
        self.east, self.west = await asyncio.gather(
            stage.sidecar("east", tls=self.files("east"), lane_listen=self.lanes, **settings),
            stage.sidecar("west", tls=self.files("west"), **settings),
        )
        self.crossing = await stage.crossing(self.east, self.west, *STAY, tls=self.files("ops"))

    async def leave(self) -> None:
        """Have the guest leave, and its pages wait to be asked for."""
        await self.crossing.start(push_disabled=True)
        await self.crossing.both_become(POSTCOPY)

    async def arrives(self) -> None:
        await self.crossing.at_source.set_limits(self.crossing.migration_id, pb.Limits())
        await self.crossing.arrives()

    def channel(self, files: TlsFiles | None, sidecar: Sidecar | None = None, name: str = "") -> grpc.aio.Channel:
        one = sidecar or self.east
        self.channels.append(open_channel(one.address, files, name or one.name))
        return self.channels[-1]

    async def refusals(self, **labels: str) -> float:
        return (await self.east.metrics())("refusals_total", **labels)

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
async def border(stage: Stage, short_path: Path) -> AsyncIterator[Border]:
    one = Border(short_path)
    await one.open(stage)
    yield one
    await one.close()


def shown(migration_id: str, token: bytes) -> tuple[tuple[str, str | bytes], ...]:
    return (("pageferry-migration", migration_id), ("pageferry-token-bin", token))


CALLS: dict[str, Callable[[grpc.aio.Channel, str], Any]] = {
    "api": lambda channel, _: migration_pb2_grpc.MigrationServiceStub(channel).ListGuests(
        pb.ListGuestsRequest(), timeout=DEADLINE
    ),
    "incoming": lambda channel, _: incoming_pb2_grpc.IncomingServiceStub(channel).Probe(
        incoming_pb2.ProbeRequest(protocol_version=1), timeout=DEADLINE
    ),
    "pages": lambda channel, migration: page_pb2_grpc.PageServiceStub(channel).GetLayout(
        page_pb2.GetLayoutRequest(), metadata=shown(migration, bytes(32)), timeout=DEADLINE
    ),
}


async def ends_with(call: Any) -> tuple[grpc.StatusCode, Reason]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc(caught.value, Reason.SIDECAR_UNREACHABLE).reason


async def test_who_proves_no_name_of_this_ca_gets_no_connection_and_the_guest_arrives(border: Border) -> None:
    foreign = border.files("foreign", Authority("another CA"), names=("west",))
    foreign.ca.write_bytes(border.authority.certificate)
    intruders: list[tuple[TlsFiles | None, str]] = [
        (foreign, "east"),
        (border.files("late", expired=True), "east"),
        (None, "east"),
        # It is east that answers, and this one is told to expect another.
        (border.files("north"), "south"),
    ]
    await border.leave()
    for files, name in intruders:
        for call in CALLS.values():
            channel = border.channel(files, name=name)
            code, _ = await ends_with(call(channel, border.crossing.migration_id))
            assert code is grpc.StatusCode.UNAVAILABLE
    anonymous = ssl.create_default_context(cadata=border.authority.certificate.decode())
    anonymous.check_hostname = False
    contexts = [client_context(foreign), client_context(border.files("late", expired=True)), anonymous, None]
    for port in (border.east.address, border.lanes):
        for context in contexts:
            assert await says_nothing(port, context)
    # The handshakes of lanes are counted; those of gRPC end inside it.
    await until(lambda: counted(border, where="lane", reason="PEER_NOT_ALLOWED", least=len(contexts)), "all counted")
    await border.arrives()


async def counted(border: Border, least: float, **labels: str) -> bool:
    return await border.refusals(**labels) >= least


async def says_nothing(address: str, context: ssl.SSLContext | None) -> bool:
    """Connect, ask for pages by hand, and say whether the connection ended without a page or a word of a page."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname="east" if context else None
        )
        try:
            writer.write(struct.pack("<I", 4) + b"\x08\x01\x12\x00")
            return len(await asyncio.wait_for(reader.read(), DEADLINE)) < 64
        finally:
            await hung_up(writer)
    except (ConnectionResetError, ssl.SSLError):
        return True


WITHOUT_THE_ROLE = [
    ("north", "api", Reason.PEER_NOT_ALLOWED),
    ("ops", "incoming", Reason.PEER_NOT_ALLOWED),
    ("ops", "pages", Reason.PEER_NOT_ALLOWED),
    ("watcher", "incoming", Reason.PEER_NOT_ALLOWED),
    ("watcher", "pages", Reason.PEER_NOT_ALLOWED),
    ("mallory", "api", Reason.PEER_NOT_ALLOWED),
    ("mallory", "incoming", Reason.PEER_NOT_ALLOWED),
    ("mallory", "pages", Reason.PEER_NOT_ALLOWED),
    ("mallory", "lane", Reason.PEER_NOT_ALLOWED),
    # A peer, but not the one to whom the guest goes; and that one without the migration's secret.
    ("north", "pages", Reason.PEER_NOT_ALLOWED),
    ("north", "lane", Reason.PEER_NOT_ALLOWED),
    ("west", "pages", Reason.TOKEN_INVALID),
    ("west", "lane", Reason.TOKEN_INVALID),
]


async def test_a_name_without_the_role_is_refused_counted_and_logged_and_the_guest_arrives(border: Border) -> None:
    await border.leave()
    expected = Counter[tuple[str, str]]()
    for who, what, reason in WITHOUT_THE_ROLE:
        files, migration_id = border.files(f"{who}-client", names=(who,)), border.crossing.migration_id
        where = {"api": "api", "lane": "lane"}.get(what, "peer")
        expected[where, reason.value] += 1
        if what == "lane":
            assert reason.value.encode() in await lane_refusal(border, files)
        else:
            call = CALLS[what](border.channel(files), migration_id)
            assert await ends_with(call) == (grpc.StatusCode.PERMISSION_DENIED, reason)
    for (where, reason), count in expected.items():
        assert await border.refusals(where=where, reason=reason) == count
    logged = [one["caller"] for one in border.east.events if one.get("event") == "caller refused"]
    for who in {who for who, _, _ in WITHOUT_THE_ROLE}:
        assert any(who in caller for caller in logged), who
    await border.arrives()


async def lane_refusal(border: Border, files: TlsFiles) -> bytes:
    """Ask for a lane of the migration with a wrong secret; return what comes back."""
    host, _, port = border.lanes.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=client_context(files), server_hostname="east")
    hello = page_pb2.LaneHello(
        migration_id=border.crossing.migration_id, token=bytes(32), lane=page_pb2.LANE_DEMAND
    ).SerializeToString()
    writer.write(struct.pack("<I", len(hello)) + hello)
    told = await asyncio.wait_for(reader.read(), DEADLINE)
    await hung_up(writer)
    return told


async def hung_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def test_a_viewer_sees_a_migration_and_cannot_touch_it(border: Border, stage: Stage) -> None:
    await border.leave()
    viewer = await stage.client(border.east, border.files("watcher"))
    migration_id = border.crossing.migration_id
    assert (await viewer.get_migration(migration_id)).state == POSTCOPY
    assert [one.migration_id for one in await viewer.list_migrations()] == [migration_id]
    assert [one.guest_id for one in await viewer.list_guests()] == [border.crossing.guest_id]
    for call in (
        viewer.cancel_migration(migration_id),
        viewer.set_limits(migration_id, pb.Limits()),
        viewer.resume_migration(migration_id),
        viewer.unregister_guest(border.crossing.guest_id),
        viewer.start_migration(border.crossing.guest_id, border.west.address, request_id="x"),
    ):
        with pytest.raises(FerryError, match="operators") as caught:
            await call
        assert caught.value.reason is Reason.ROLE_MISSING
    await border.arrives()


async def test_certificates_of_a_ca_that_was_replaced_open_no_new_connection(border: Border) -> None:
    """Connections that exist go on: the guest that is under way arrives over them."""
    await border.leave()
    old = border.files("old-north")
    await CALLS["incoming"](border.channel(border.files("north")), "")

    border.authority = Authority("the next CA")
    for name in ("east", "west"):
        border.files(name)
    # It would trust the hosts still: only they can refuse.
    old.ca.write_bytes(border.authority.certificate)
    assert (await ends_with(CALLS["incoming"](border.channel(old), "")))[0] is grpc.StatusCode.UNAVAILABLE
    assert await says_nothing(border.lanes, client_context(old))
    await until(lambda: counted(border, where="lane", reason="PEER_NOT_ALLOWED", least=1), "it is counted")
    await CALLS["incoming"](border.channel(border.files("north")), "")
    await border.arrives()


async def test_while_peers_flood_and_stall_and_talk_nonsense_a_guest_arrives(border: Border) -> None:
    """Everything at once, at the host that the guest leaves and without an end before it has arrived."""
    north, stranger = border.files("north"), border.files("mallory")
    await border.leave()
    async with contextlib.AsyncExitStack() as stack:
        # Connections that say nothing, at both ports.
        for address in (border.east.address, border.lanes):
            host, _, port = address.rpartition(":")
            for _ in range(400):
                _, writer = await asyncio.open_connection(host, int(port))
                stack.push_async_callback(hung_up, writer)
        # Lanes of a right certificate that say nothing.
        context = client_context(north)
        host, _, port = border.lanes.rpartition(":")
        for _ in range(30):
            _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="east")
            stack.push_async_callback(hung_up, writer)
        # Streams without a message, by the hundred; calls as large as may be; messages that are none.
        crowd = page_pb2_grpc.PageServiceStub(border.channel(north))
        streams = [crowd.FetchPages(metadata=shown("nobody", bytes(32)), timeout=DEADLINE) for _ in range(400)]
        large = [
            border.channel(stranger).unary_unary("/pageferry.v1.IncomingService/HandOver")(
                bytes(8 * MIB), timeout=DEADLINE
            )
            for _ in range(4)
        ]
        nonsense = border.channel(north).unary_unary("/pageferry.v1.IncomingService/Prepare")
        too_large = border.channel(north).unary_unary("/pageferry.v1.IncomingService/HandOver")
        assert (await ends_with(nonsense(os.urandom(MIB), timeout=DEADLINE)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await ends_with(too_large(bytes(81 * MIB), timeout=DEADLINE)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await border.arrives()
        assert {await call.code() for call in large} == {grpc.StatusCode.PERMISSION_DENIED}
        assert grpc.StatusCode.OK not in {await stream.code() for stream in streams}
    assert border.east.alive
    assert "Traceback" not in "".join(border.east.other_lines)


CONNECT = f"""
import os, socket, sys
os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(path)
            print("in")
        except OSError as error:
            print(type(error).__name__)
"""


async def test_another_user_of_the_host_reaches_none_of_the_sockets(stage: Stage, short_path: Path) -> None:
    """Their directory is open to all here: only the sockets, or the guest's own directory, keep others out."""
    os.chmod(short_path, 0o755)  # noqa: PTH101
    api, lanes = short_path / "api.sock", short_path / "lanes.sock"
    east = await stage.sidecar("east", lane_listen=f"unix:{lanes}", listen=[f"unix:{short_path}/grpc.sock"])
    west = await stage.sidecar("west", api_socket=str(api))
    crossing = await stage.crossing(east, west, hostile="attach-hangs")
    await crossing.start()
    await crossing.becomes(crossing.at_destination, PREPARING)

    async def listening() -> list[Path]:
        found = [path for path in west.runtime_dir.rglob("*.sock") if stat.S_ISSOCK(path.stat().st_mode)]
        return found if {path.name for path in found} >= {"handoff.sock", "faults.sock"} else []

    ours = await until(listening, "the VMM's sockets are there")
    sockets = [api, lanes, short_path / "grpc.sock", *ours]
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in ours} == {0o700}
    command = [sys.executable, "-c", CONNECT, *map(str, sockets)]
    tried = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert tried.stdout.split() == ["PermissionError"] * len(sockets)
    await crossing.at_source.cancel_migration(crossing.migration_id)
    await crossing.runs_at_source()


async def test_a_vmm_that_names_somebody_elses_file_gets_nothing_of_it_moved(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    secret = stage.directory / "shadow"
    with secret.open("wb") as file:
        file.truncate(16 * MIB)
    secret.chmod(0o600)
    before = (await alpha.metrics())("refusals_total", where="vmm", reason="MEMORY_NOT_ITS_OWN")
    crossing = await stage.crossing(alpha, beta, hostile_source=f"names-{secret}")
    await crossing.start()
    failed = await crossing.fails(Reason.MEMORY_NOT_ITS_OWN)
    assert str(secret) in failed.error.message
    assert (await alpha.metrics())("refusals_total", where="vmm", reason="MEMORY_NOT_ITS_OWN") == before + 1


@pytest.mark.parametrize("how", ["hand-foreign", "hand-elsewhere"])
async def test_a_vmm_that_hands_over_memory_of_another_process_gets_no_guest(
    stage: Stage, alpha: Sidecar, beta: Sidecar, how: str
) -> None:
    before = (await beta.metrics())("refusals_total", where="handoff", reason="MEMORY_NOT_ITS_OWN")
    crossing: Crossing = await stage.crossing(alpha, beta, hostile=how)
    await crossing.start()
    await crossing.fails(Reason.MEMORY_NOT_ITS_OWN)
    assert (await beta.metrics())("refusals_total", where="handoff", reason="MEMORY_NOT_ITS_OWN") == before + 1
