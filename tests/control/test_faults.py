"""Where a guest's VMM forwards its faults: a socket for it alone, open from before the hand-off until the end."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from forwarding_vmm import DEADLINE, ForwardingVmm, HandSession
from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2 as pb
from pageferryd.config import Settings
from pageferryd.control import faults as subject
from pageferryd.control.faults import Faults
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.door import Settled
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.handed_over import Handoff
from pageferryd.linux.vmm_directory import VmmDirectory

LAYOUT = Layout([Region(0, 8 * PAGE_SIZE)])
NOBODY = 65534


class Host:
    """The faults of one guest, with the pager's part left to the test."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.door = ExitDoor(LAYOUT)
        self.session: Any = None
        self.vmms: list[ForwardingVmm] = []
        self.connection, self.far_end = socket.socketpair()
        self.connection.setblocking(False)

    def connect(self) -> None:
        self.session = HandSession(self.door)
        handoff = Handoff(None, AddressMap(LAYOUT, [1 << 30]), self.connection, LAYOUT)
        self.faults.connect(self.door, self.session, handoff)

    def vmm(self, token: bytes | None = None) -> ForwardingVmm:
        self.vmms.append(ForwardingVmm(self.faults.endpoint, token))
        return self.vmms[-1]

    async def close(self) -> None:
        for vmm in self.vmms:
            await vmm.close()
        await self.faults.stop()
        self.connection.close()
        self.far_end.close()


Start = Callable[..., Awaitable[Host]]


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return Settings(host="a", listen=["127.0.0.1:0"], insecure=True, runtime_dir=short_dir)


@pytest.fixture
async def start(settings: Settings) -> AsyncIterator[Start]:
    hosts: list[Host] = []

    async def one(name: str = "g", pid: int | None = None) -> Host:
        pid = os.getpid() if pid is None else pid
        hosts.append(Host(await Faults.start(settings, VmmDirectory.make(settings.runtime_dir, name, pid))))
        return hosts[-1]

    yield one
    for host in hosts:
        await host.close()


async def test_a_fault_is_answered_over_the_socket(start: Start) -> None:
    host = await start()
    host.connect()
    vmm = host.vmm()
    token = await vmm.ask(2 * PAGE_SIZE)
    await host.session.until(1)
    host.door.settled(2, 1, Settled.INSTALLED)
    response = await vmm.answer()
    assert (response.token, response.outcome) == (token, pb.OUTCOME_INSTALLED)


async def test_a_fault_is_answered_as_json_on_the_hand_offs_connection_too(start: Start) -> None:
    host = await start()
    host.connect()
    host.far_end.sendall(b'{"vcpu":1,"offset":8192,"flags":16,"token":9}')
    await host.session.until(1)
    host.door.settled(2, 1, Settled.ZERO)
    host.far_end.settimeout(DEADLINE)
    reply = await asyncio.to_thread(host.far_end.recv, 4096)
    assert reply == b'{"vcpu":1,"token":9,"offset":8192,"len":4096,"flags":16,"zero":true}'


async def test_before_the_hand_off_faults_are_refused(start: Start) -> None:
    host = await start()
    vmm = host.vmm()
    vmm.open()
    assert await vmm.ended() is Reason.ILLEGAL_STATE


@pytest.mark.parametrize("token", [b"", b"wrong", bytes(32), b"\xff" * 33], ids=["none", "short", "zeroes", "long"])
async def test_without_the_secret_nothing_is_told(start: Start, token: bytes) -> None:
    host = await start()
    host.connect()
    vmm = host.vmm(token)
    vmm.open()
    assert await vmm.ended() is Reason.TOKEN_INVALID
    calls = [
        (vmm.stub.ConvertRange, pb.ConvertRangeRequest(guest_address=0, size=PAGE_SIZE, sharing=pb.SHARING_PRIVATE)),
        (vmm.stub.ReportImports, pb.ReportImportsRequest()),
    ]
    for call, request in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request, metadata=vmm.metadata, timeout=DEADLINE)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert host.session.converted == []


async def test_the_secret_of_one_guest_opens_no_other(start: Start) -> None:
    one, other = await start("one"), await start("other")
    one.connect()
    other.connect()
    assert one.faults.endpoint.token != other.faults.endpoint.token
    vmm = one.vmm(other.faults.endpoint.token)
    vmm.open()
    assert await vmm.ended() is Reason.TOKEN_INVALID


async def test_the_secret_is_not_shown_where_the_endpoint_is(start: Start) -> None:
    host = await start()
    assert str(host.faults.endpoint.token) not in repr(host.faults.endpoint)


CONNECT = """
import os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except PermissionError:
    sys.exit(13)
"""


async def connect_as(user: int, path: str) -> int:
    """Connect in a process of that user; return 0, or 13 where it may not."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CONNECT, path, str(user))
    return await asyncio.wait_for(process.wait(), DEADLINE)


def owner_and_mode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_mode & 0o777


def open_the_way(path: Path) -> None:
    """Let any user pass through the directories to a file, as a runtime directory may."""
    for parent in path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)


@pytest.mark.root
async def test_the_socket_is_open_to_nobody_but_the_vmms_user(start: Start) -> None:
    host = await start()
    path = Path(host.faults.endpoint.socket_path)
    assert owner_and_mode(path) == (os.geteuid(), 0o600)
    open_the_way(path)
    assert await connect_as(NOBODY, str(path)) == 13


@pytest.mark.root
async def test_the_socket_belongs_to_the_user_that_the_vmm_runs_as(start: Start) -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60", user=NOBODY, group=NOBODY)
    try:
        host = await start(pid=child.pid)
        path = Path(host.faults.endpoint.socket_path)
        assert owner_and_mode(path) == (NOBODY, 0o600)
        open_the_way(path)
        assert await connect_as(NOBODY, str(path)) == 0
        assert await connect_as(NOBODY - 1, str(path)) == 13
    finally:
        child.kill()
        await child.wait()


async def test_a_socket_that_was_left_behind_is_replaced_and_the_end_removes_it(
    settings: Settings, start: Start
) -> None:
    path = settings.runtime_dir / "g" / "faults.sock"
    directory = VmmDirectory.make(settings.runtime_dir, "g", os.getpid())
    path.write_text("left behind")
    host = Host(await Faults.start(settings, directory))
    host.connect()
    await host.close()
    assert not path.exists()


async def test_a_directory_that_is_not_there_is_named(settings: Settings) -> None:
    nowhere = VmmDirectory.make(settings.runtime_dir, "nowhere", os.getpid())
    nowhere.remove()
    with pytest.raises(FerryError, match="nowhere") as refused:
        await Faults.start(settings, nowhere)
    assert refused.value.reason is Reason.PERMISSION_MISSING


async def test_the_end_ends_streams_and_leaves_the_hand_offs_connection_open(start: Start) -> None:
    host = await start()
    host.connect()
    vmm = host.vmm()
    await vmm.ask(0)
    await host.session.until(1)
    await host.faults.stop()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await vmm.answer()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    # What the connection is open for is the hand-off's to say.
    host.connection.send(b"x")


async def test_one_vmm_has_no_more_calls_than_it_needs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MAX_CALLS", 2)
    host = await start()
    other = await start("other")
    host.connect()
    other.connect()
    vmms = [host.vmm() for _ in range(2)]
    for vmm in vmms:
        await vmm.ask(0)
    await host.session.until(2)
    late = host.vmm()
    late.open()
    with pytest.raises(grpc.aio.AioRpcError) as too_many:
        await late.answer()
    assert too_many.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # Another guest's VMM has its own.
    await other.vmm().ask(0)
    await other.session.until(1)
