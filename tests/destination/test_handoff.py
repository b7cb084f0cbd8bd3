"""The hand-off: what a VMM may send, and everything that it may not. No file descriptor is leaked by any of it."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded import DEADLINE, Guarded
from waiting_vmm import WaitingVmm

from pageferry.errors import FerryError, Reason
from pageferry.vmm.handoff import HandoffRegion, encode_table
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination import handoff
from pageferryd.destination.handoff import Handoff, HandoffListener, read_table
from pageferryd.linux.buffers import address_of

pytestmark = pytest.mark.userfaultfd
Files = Callable[[], Counter[str]]


class Vmm:
    """This process as the VMM, with two regions, and a listener that expects it."""

    def __init__(self, guarded: Guarded, path: Path) -> None:
        self.guarded = guarded
        self.layout = guarded.layout
        self.listener = HandoffListener(path, self.layout, os.getpid())
        self.table = [
            {"base_host_virt_addr": memory.address, "size": memory.size, "offset": offset, "page_size": PAGE_SIZE}
            for memory, offset in zip(guarded.memories, (0, guarded.memories[0].size), strict=True)
        ]
        self._connections: list[socket.socket] = []

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections.append(connection)
        connection.settimeout(DEADLINE)
        connection.connect(str(self.listener.path))
        return connection

    def send(self, data: bytes, *fds: int) -> socket.socket:
        connection = self.connect()
        send_with(connection, data, *fds)
        return connection

    def send_table(self, table: object, *fds: int) -> socket.socket:
        return self.send(json.dumps(table).encode(), *fds or (self.guarded.uffd.fileno(),))

    async def refused(self, seconds: float = DEADLINE) -> Reason:
        with pytest.raises(FerryError) as refused:
            await self.listener.receive(seconds)
        return refused.value.reason

    def close(self) -> None:
        self.listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        while self._connections:
            self._connections.pop().close()


def send_with(connection: socket.socket, data: bytes, *fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert connection.sendmsg([data], rights) == len(data)


@pytest.fixture
def vmm(guard: Callable[..., Guarded], short_dir: Path) -> Iterator[Vmm]:
    one = Vmm(guard(4, 2), short_dir / "handoff.sock")
    yield one
    one.close()


@pytest.fixture
async def no_leak(vmm: Vmm, open_files: Files) -> AsyncIterator[None]:
    """Assert that everything that came was closed again."""
    # What a loop opens for itself when it is used first is there already.
    before = open_files()
    yield
    vmm.hang_up()
    await asyncio.sleep(0)
    # What an earlier test has left behind may be closed meanwhile.
    assert not open_files() - before


def works(taken: Handoff, vmm: Vmm) -> None:
    """Assert that pages can be installed by it."""
    reading = vmm.guarded.reading(4)
    vmm.guarded.wait_queued()
    page = b"p" * PAGE_SIZE
    assert taken.uffd.copy(taken.addresses.address_of(4), address_of(page), PAGE_SIZE)[0] == PAGE_SIZE
    assert reading.result(DEADLINE) == page


async def test_the_librarys_hand_off_is_taken(vmm: Vmm, no_leak: None) -> None:
    regions = [HandoffRegion(entry["base_host_virt_addr"], entry["size"], entry["offset"]) for entry in vmm.table]
    vmm.send(encode_table(regions), vmm.guarded.uffd.fileno())
    taken = await vmm.listener.receive(DEADLINE)
    works(taken, vmm)
    assert not os.get_inheritable(taken.uffd.fileno())
    taken.close()


async def test_it_is_taken_from_another_process(short_dir: Path) -> None:
    path = short_dir / "handoff.sock"
    child = await WaitingVmm.start(path, 4)
    listener = HandoffListener(path, Layout([Region(0, 4 * PAGE_SIZE)]), child.pid)
    try:
        await child.tell("go")
        taken = await listener.receive(DEADLINE)
        assert await child.answer() == "ready"
        await child.tell(2)
        page = b"ferried!" * (PAGE_SIZE // 8)
        assert taken.uffd.copy(taken.addresses.address_of(2), address_of(page), PAGE_SIZE)[0] == PAGE_SIZE
        assert bytes.fromhex(await child.answer()) == b"ferried!"
        taken.close()
    finally:
        listener.close()
        await child.kill()


async def test_an_older_firecracker_gives_the_page_size_in_page_size_kib_in_bytes(vmm: Vmm, no_leak: None) -> None:
    for entry in vmm.table:
        entry["page_size_kib"] = entry.pop("page_size")
    vmm.send_table(vmm.table)
    (await vmm.listener.receive(DEADLINE)).close()


async def test_regions_may_come_in_any_order_with_fields_that_are_not_known(vmm: Vmm, no_leak: None) -> None:
    vmm.send_table([{**entry, "future": [1, "x"]} for entry in reversed(vmm.table)])
    taken = await vmm.listener.receive(DEADLINE)
    assert taken.addresses.addresses == tuple(memory.address for memory in vmm.guarded.memories)
    taken.close()


async def test_a_table_may_come_in_pieces(vmm: Vmm, no_leak: None) -> None:
    data = json.dumps(vmm.table, indent=1).encode()
    receiving = asyncio.create_task(vmm.listener.receive(DEADLINE))
    connection = vmm.connect()
    send_with(connection, data[:1], vmm.guarded.uffd.fileno())
    for at in range(1, len(data), 40):
        connection.sendall(data[at : at + 40])
        await asyncio.sleep(0)
    (await receiving).close()


def other(vmm: Vmm, entry: int, **fields: Any) -> list[dict[str, Any]]:
    table = [dict(one) for one in vmm.table]
    table[entry].update(fields)
    return table


WRONG_REGIONS: dict[str, Callable[[Vmm], object]] = {
    "no region": lambda vmm: [],
    "one region less": lambda vmm: vmm.table[:1],
    "one region more": lambda vmm: [*vmm.table, vmm.table[0]],
    "twice the same": lambda vmm: [vmm.table[0], vmm.table[0]],
    "overlapping": lambda vmm: other(vmm, 1, base_host_virt_addr=vmm.table[0]["base_host_virt_addr"] + PAGE_SIZE),
    "unaligned": lambda vmm: other(vmm, 0, base_host_virt_addr=vmm.table[0]["base_host_virt_addr"] + 8),
    "at null": lambda vmm: other(vmm, 0, base_host_virt_addr=0),
    "beyond the address space": lambda vmm: other(vmm, 0, base_host_virt_addr=2**64 - PAGE_SIZE),
    "too small": lambda vmm: other(vmm, 1, size=PAGE_SIZE),
    "too large": lambda vmm: other(vmm, 1, size=3 * PAGE_SIZE),
    "elsewhere in the flat space": lambda vmm: other(vmm, 1, offset=5 * PAGE_SIZE),
    "huge pages": lambda vmm: other(vmm, 0, page_size=2 << 20),
    "page size in KiB": lambda vmm: other(vmm, 0, page_size=4),
}


@pytest.mark.parametrize("case", WRONG_REGIONS)
async def test_regions_that_are_not_the_guests_are_refused(vmm: Vmm, case: str, no_leak: None) -> None:
    vmm.send_table(WRONG_REGIONS[case](vmm))
    assert await vmm.refused() is Reason.HANDOFF_REGIONS


MALFORMED: dict[str, Callable[[Vmm], bytes]] = {
    "no JSON": lambda vmm: b"hello",
    "an object": lambda vmm: b'{"a": 1}',
    "no objects in it": lambda vmm: b"[1, 2]",
    "lists in it": lambda vmm: b"[[], []]",
    "no fields": lambda vmm: b"[{}, {}]",
    "a negative size": lambda vmm: json.dumps(other(vmm, 0, size=-1)).encode(),
    "a size beyond 64 bits": lambda vmm: json.dumps(other(vmm, 0, size=2**64)).encode(),
    "a float": lambda vmm: json.dumps(other(vmm, 0, size=4096.0)).encode(),
    "text for a number": lambda vmm: json.dumps(other(vmm, 0, offset="0")).encode(),
    "true for a number": lambda vmm: json.dumps(other(vmm, 0, page_size=True)).encode(),
    "no page size": lambda vmm: json.dumps([{**e, "page_size": None} for e in vmm.table]).encode(),
    "bytes that are no text": lambda vmm: b"\xff\xfe\x00\xd8",
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_what_is_no_table_is_refused(vmm: Vmm, case: str, no_leak: None) -> None:
    vmm.send(MALFORMED[case](vmm), vmm.guarded.uffd.fileno())
    assert await vmm.refused() is Reason.HANDOFF_MALFORMED


async def test_nonsense_is_refused_while_its_sender_stays(vmm: Vmm, no_leak: None) -> None:
    connection = vmm.connect()
    send_with(connection, b"[nonsense]", vmm.guarded.uffd.fileno())
    assert await vmm.refused() is Reason.HANDOFF_MALFORMED
    connection.close()


@pytest.mark.parametrize("start", [b"", b"[", b'[{"a"', b"[nonsense]", b"[" * 2000 + b"]" * 2000 + b"x"])
async def test_what_ends_before_its_table_does_is_refused(vmm: Vmm, start: bytes, no_leak: None) -> None:
    connection = vmm.connect()
    if start:
        send_with(connection, start, vmm.guarded.uffd.fileno())
    connection.close()
    assert await vmm.refused() is Reason.HANDOFF_MALFORMED


async def test_an_endless_table_is_refused_when_it_is_too_long(vmm: Vmm, no_leak: None) -> None:
    refused = asyncio.create_task(vmm.refused())
    connection = vmm.connect()
    connection.setblocking(False)
    send_with(connection, b"[", vmm.guarded.uffd.fileno())
    loop = asyncio.get_running_loop()
    sent = 0
    try:
        while not refused.done():
            await loop.sock_sendall(connection, b" " * 65536)
            sent += 65536
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert await refused is Reason.HANDOFF_MALFORMED
    assert sent < 2 * handoff.MAX_TABLE_BYTES + (1 << 20)


async def test_descriptors_without_end_are_refused(vmm: Vmm, open_files: Files, no_leak: None) -> None:
    refused = asyncio.create_task(vmm.refused())
    before = open_files()
    connection = vmm.connect()
    most = 0
    try:
        for _ in range(50):
            send_with(connection, b"[", vmm.guarded.uffd.fileno())
            await asyncio.sleep(0)
            most = max(most, (open_files() - before).total())
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert await refused is Reason.HANDOFF_MALFORMED
    assert most < 20


async def test_a_hand_off_without_a_descriptor_is_refused(vmm: Vmm, no_leak: None) -> None:
    vmm.send(json.dumps(vmm.table).encode())
    assert await vmm.refused() is Reason.HANDOFF_NO_FD


@pytest.mark.parametrize("count", [2, 3, 8])
async def test_a_hand_off_with_several_descriptors_is_refused(vmm: Vmm, count: int, no_leak: None) -> None:
    vmm.send_table(vmm.table, *[vmm.guarded.uffd.fileno()] * count)
    assert await vmm.refused() is Reason.HANDOFF_NO_FD


async def test_a_descriptor_that_is_no_userfaultfd_is_refused(vmm: Vmm, no_leak: None) -> None:
    with open("/dev/null") as file:  # noqa: ASYNC230
        vmm.send_table(vmm.table, file.fileno())
        assert await vmm.refused() is Reason.HANDOFF_NO_FD


async def test_another_process_than_the_vmm_is_refused(short_dir: Path, open_files: Files) -> None:
    path = short_dir / "handoff.sock"
    child = await WaitingVmm.start(path, 4)
    before = open_files()
    listener = HandoffListener(path, Layout([Region(0, 4 * PAGE_SIZE)]), os.getpid())
    try:
        await child.tell("go")
        with pytest.raises(FerryError) as refused:
            await listener.receive(DEADLINE)
        assert refused.value.reason is Reason.HANDOFF_WRONG_PEER
    finally:
        listener.close()
        await asyncio.sleep(0)
        after = open_files()
        await child.kill()
    assert not after - before


async def test_a_vmm_that_cannot_be_seen_is_refused(vmm: Vmm, no_leak: None) -> None:
    unseen = HandoffListener(vmm.listener.path.with_name("unseen.sock"), vmm.layout, 0)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(unseen.path))
    with pytest.raises(FerryError) as refused:
        await unseen.receive(DEADLINE)
    assert refused.value.reason is Reason.HANDOFF_WRONG_PEER
    connection.close()
    unseen.close()


async def test_a_vmm_that_does_not_come_is_waited_for_no_longer_than_told(vmm: Vmm, no_leak: None) -> None:
    assert await vmm.refused(0.02) is Reason.HANDOFF_TIMEOUT


@pytest.mark.parametrize("start", [b"", b'[{"base_host_virt_addr": 1'])
async def test_a_vmm_that_falls_silent_is_waited_for_no_longer_than_told(vmm: Vmm, start: bytes, no_leak: None) -> None:
    connection = vmm.connect()
    if start:
        send_with(connection, start, vmm.guarded.uffd.fileno())
    assert await vmm.refused(0.05) is Reason.HANDOFF_TIMEOUT


async def test_a_wait_that_is_cancelled_lets_go_of_what_came(vmm: Vmm, no_leak: None) -> None:
    vmm.send(b"[", vmm.guarded.uffd.fileno())
    receiving = asyncio.create_task(vmm.listener.receive(DEADLINE))
    while not receiving.done():
        await asyncio.sleep(0)
        if handoff_has_read(vmm):
            receiving.cancel()
            break
    with pytest.raises(asyncio.CancelledError):
        await receiving


def handoff_has_read(vmm: Vmm) -> bool:
    """Say whether the first bytes have left the sender's queue."""
    import fcntl
    import struct

    siocoutq = 0x5411
    (connection,) = vmm._connections
    return struct.unpack("i", fcntl.ioctl(connection, siocoutq, bytes(4)))[0] == 0


async def test_the_socket_is_the_owners_alone_and_replaces_an_old_one(short_dir: Path) -> None:
    path = short_dir / "handoff.sock"
    path.write_text("left behind")
    listener = HandoffListener(path, Layout([Region(0, PAGE_SIZE)]), os.getpid())
    assert path.stat().st_mode & 0o777 == 0o600
    listener.close()
    assert not path.exists()


async def test_a_directory_that_is_not_there_is_named(short_dir: Path, open_files: Files) -> None:
    before = open_files()
    with pytest.raises(FerryError, match="nowhere") as refused:
        HandoffListener(short_dir / "nowhere" / "s", Layout([Region(0, PAGE_SIZE)]), 1)
    assert refused.value.reason is Reason.PERMISSION_MISSING
    # What an earlier test has left behind may be closed meanwhile.
    assert not open_files() - before


def test_addresses_come_in_the_order_of_the_layout_not_of_the_table() -> None:
    layout = Layout([Region(1 << 32, PAGE_SIZE), Region(0, 2 * PAGE_SIZE)])
    table = [
        {"base_host_virt_addr": 0x10000, "size": 2 * PAGE_SIZE, "offset": PAGE_SIZE, "page_size": PAGE_SIZE},
        {"base_host_virt_addr": 0x80000, "size": PAGE_SIZE, "offset": 0, "page_size": PAGE_SIZE},
    ]
    assert read_table(table, layout).addresses == (0x80000, 0x10000)
