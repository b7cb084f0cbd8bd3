"""The offload door: a VMM asks for pages on a connection, and is answered when they are in its memory file."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future

import pytest
from door_conformance import DEADLINE, Delivered, DoorConformance

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination import offload_door
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.destination.offload_door import OffloadDoor

HIGH = 1 << 32
LAYOUT = Layout([Region(0, 5 * PAGE_SIZE), Region(HIGH, 3 * PAGE_SIZE)])
OK = struct.pack("<H6xQ", 1, 0)
ERROR = struct.pack("<H6xQ", 2, 0)


def asking(address: int, length: int) -> bytes:
    return struct.pack("<H6xQQQ", 9, 16, address, length)


def asking_for(page: int, pages: int = 1, layout: Layout = LAYOUT) -> bytes:
    return asking(layout.guest_address_of(page), pages * PAGE_SIZE)


class OffloadHouse:
    """A VMM that sends many requests before it is answered, as a door may be asked."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ours = ours
        self.door = OffloadDoor(LAYOUT, ours, lambda _first, _pages: None)
        self._waiting: deque[tuple[int, Future[bytes]]] = deque()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Hung up on with a request unread, it is told so.
        with contextlib.suppress(ConnectionResetError):
            while self._theirs.recv(16, socket.MSG_WAITALL) == OK:
                self._waiting.popleft()[1].set_result(b"\0")

    def touch(self, page: int) -> Future[bytes]:
        reading: Future[bytes] = Future()
        self._waiting.append((page, reading))
        self._theirs.sendall(asking_for(page))
        return reading

    def wait_queued(self) -> None:
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        assert poll.poll(DEADLINE * 1000)

    def install(self, page: int) -> None:
        before = [reading for touched, reading in self._waiting if touched == page]
        self.door.settled(page, 1, Settled.ZERO)
        if self.door._deliver is None and before:
            # The door is closed: whoever sits behind the next one answers.
            self._ours.sendall(OK)

    def close(self) -> None:
        self.door.close()
        self._ours.close()
        self._reader.join(DEADLINE)
        self._theirs.close()


@pytest.fixture
async def house() -> AsyncIterator[OffloadHouse]:
    made = OffloadHouse()
    yield made
    made.close()


class TestOffloadDoor(DoorConformance):
    """Passes what every door must."""


class Vmm:
    """The VMM's end of a door's connection, which does not block; what the door makes present is noted."""

    def __init__(self, delivered: Delivered, layout: Layout = LAYOUT) -> None:
        ours, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.ours = ours
        self.end.setblocking(False)
        self.present: list[tuple[int, int]] = []
        self.failure: FerryError | None = None
        self.door = OffloadDoor(layout, ours, self._make_present)
        self.door.open(delivered.take, delivered.fail)

    def _make_present(self, first: int, pages: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.present.append((first, pages))

    async def asks(self, *requests: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.end, b"".join(requests))

    async def is_answered(self, *answers: bytes) -> None:
        expected, found = b"".join(answers), b""
        async with asyncio.timeout(DEADLINE):
            while len(found) < len(expected):
                found += await asyncio.get_running_loop().sock_recv(self.end, len(expected) - len(found))
        assert found == expected

    def is_not_answered(self) -> None:
        with pytest.raises(BlockingIOError):
            self.end.recv(1)

    def close(self) -> None:
        self.ours.close()
        self.end.close()


@pytest.fixture
async def vmm(delivered: Delivered) -> AsyncIterator[Vmm]:
    made = Vmm(delivered)
    yield made
    made.door.close()
    made.close()


async def test_a_page_is_made_present_before_it_is_answered_for(vmm: Vmm, delivered: Delivered) -> None:
    await vmm.asks(asking(HIGH + PAGE_SIZE, PAGE_SIZE))
    await delivered.until_faults(6)
    assert vmm.present == []
    vmm.door.settled(6, 1, Settled.ZERO)
    assert vmm.present == [(6, 1)]
    await vmm.is_answered(OK)


async def test_a_request_that_comes_in_pieces_is_one_request(vmm: Vmm, delivered: Delivered) -> None:
    for byte in asking_for(2):
        assert delivered.faults == set()
        await vmm.asks(bytes([byte]))
        vmm.door.drain()
    assert delivered.faults == {2}


async def test_pages_asked_for_at_once_are_answered_together(vmm: Vmm, delivered: Delivered) -> None:
    await vmm.asks(asking_for(1, 4))
    await delivered.until_faults(1, 2, 3, 4)
    vmm.door.settled(0, 4, Settled.INSTALLED)
    vmm.is_not_answered()
    vmm.door.settled(4, 4, Settled.INSTALLED)
    await vmm.is_answered(OK)
    assert vmm.present == [(1, 4)]
    vmm.is_not_answered()


async def test_answers_come_in_the_order_of_the_requests(vmm: Vmm, delivered: Delivered) -> None:
    await vmm.asks(asking_for(0), asking_for(1), asking_for(2))
    await delivered.until_faults(0, 1, 2)
    vmm.door.settled(1, 2, Settled.POISONED)
    vmm.is_not_answered()
    vmm.door.settled(0, 1, Settled.INSTALLED)
    await vmm.is_answered(OK, ERROR, ERROR)


async def test_a_page_that_the_source_could_not_read_is_an_error_and_stays_a_hole(
    vmm: Vmm, delivered: Delivered
) -> None:
    await vmm.asks(asking_for(0, 3))
    await delivered.until_faults(0, 1, 2)
    vmm.door.settled(1, 1, Settled.POISONED)
    vmm.door.settled(0, 3, Settled.INSTALLED)
    await vmm.is_answered(ERROR)
    assert vmm.present == []


async def test_a_page_may_be_asked_for_again(vmm: Vmm, delivered: Delivered) -> None:
    for _ in range(2):
        await vmm.asks(asking_for(3))
        await delivered.next()
        vmm.door.settled(3, 1, Settled.PRESENT)
        await vmm.is_answered(OK)
    assert vmm.present == [(3, 1), (3, 1)]


async def test_a_large_request_is_worked_off_in_slices_and_answered_once(
    delivered: Delivered, request: pytest.FixtureRequest
) -> None:
    layout = Layout([Region(0, 40_000 * PAGE_SIZE)])
    seen: list[int] = []
    vmm = Vmm(delivered, layout)
    request.addfinalizer(vmm.close)

    def settle_at_once(events: DoorEvents) -> None:
        assert len(events.faults) <= offload_door.SLICE_PAGES
        seen.extend(events.faults)
        vmm.door.settled(events.faults[0], len(events.faults), Settled.PRESENT)

    vmm.door.close()
    vmm.door.open(settle_at_once, delivered.fail)
    await vmm.asks(asking_for(0, 40_000, layout))
    await vmm.is_answered(OK)
    assert seen == list(range(40_000))
    assert vmm.present == [(0, 40_000)]
    assert not delivered.failures
    vmm.door.close()


async def test_so_many_requests_wait_and_no_more_are_read(vmm: Vmm, delivered: Delivered) -> None:
    many = offload_door.MAX_WAITING
    await vmm.asks(*[asking_for(0)] * (many + 30))
    await delivered.until_faults(0)
    vmm.door.drain()
    assert len(delivered.events) == many

    vmm.door.settled(0, 1, Settled.INSTALLED)
    async with asyncio.timeout(DEADLINE):
        while len(delivered.events) < many + 30:
            await delivered.next()
    vmm.door.settled(0, 1, Settled.PRESENT)
    await vmm.is_answered(*[OK] * (many + 30))


async def test_a_vmm_that_takes_no_answers_is_asked_for_no_more(vmm: Vmm, delivered: Delivered) -> None:
    vmm.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    many = offload_door.MAX_WAITING
    await vmm.asks(*[asking_for(0)] * many)
    await delivered.until_faults(0)
    vmm.door.settled(0, 1, Settled.INSTALLED)
    assert vmm.door._to_send
    await vmm.asks(asking_for(1))
    vmm.door.drain()
    assert delivered.faults == {0}

    await vmm.is_answered(*[OK] * many)
    await delivered.until_faults(1)
    vmm.door.settled(1, 1, Settled.INSTALLED)
    await vmm.is_answered(OK)


WRONG = {
    "another command": (struct.pack("<H6xQ", 3, 0), Reason.HANDOFF_MALFORMED),
    "no command": (bytes(16), Reason.HANDOFF_MALFORMED),
    "another length": (struct.pack("<H6xQ", 9, 1 << 40), Reason.HANDOFF_MALFORMED),
    "outside of the guest": (asking(1 << 40, PAGE_SIZE), Reason.PAGE_OUT_OF_RANGE),
    "in the hole": (asking(5 * PAGE_SIZE, PAGE_SIZE), Reason.PAGE_OUT_OF_RANGE),
    "out of a region": (asking(4 * PAGE_SIZE, 2 * PAGE_SIZE), Reason.PAGE_OUT_OF_RANGE),
    "over the hole": (asking(0, HIGH + PAGE_SIZE), Reason.PAGE_OUT_OF_RANGE),
    "beyond all addresses": (asking(HIGH, (1 << 64) - PAGE_SIZE), Reason.PAGE_OUT_OF_RANGE),
    "half a page": (asking(0, PAGE_SIZE // 2), Reason.PAGE_OUT_OF_RANGE),
    "between two pages": (asking(100, PAGE_SIZE), Reason.PAGE_OUT_OF_RANGE),
    "nothing": (asking(0, 0), Reason.PAGE_OUT_OF_RANGE),
}


@pytest.mark.parametrize(("request_", "reason"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_request_fails_the_door_once_and_is_not_answered(
    vmm: Vmm, delivered: Delivered, request_: bytes, reason: Reason
) -> None:
    await vmm.asks(asking_for(0), request_, asking_for(1))
    async with asyncio.timeout(DEADLINE):
        while not delivered.failures:
            await delivered.next()
    vmm.door.drain()
    vmm.door.settled(0, 8, Settled.INSTALLED)

    assert [error.reason for error in delivered.failures if isinstance(error, FerryError)] == [reason]
    assert delivered.faults == {0}
    vmm.is_not_answered()
    with pytest.raises(FerryError):
        await vmm.door.finished()


async def test_a_host_without_memory_answers_when_it_has_some(
    vmm: Vmm, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_door, "_RETRY_SECONDS", 0.01)
    vmm.failure = FerryError(Reason.NO_SPACE, "no memory")
    await vmm.asks(asking_for(0))
    await delivered.until_faults(0)
    vmm.door.settled(0, 1, Settled.ZERO)
    await asyncio.sleep(0.05)
    vmm.is_not_answered()
    assert not delivered.failures

    vmm.failure = None
    await vmm.is_answered(OK)


async def test_a_file_that_cannot_hold_the_page_fails_the_door(vmm: Vmm, delivered: Delivered) -> None:
    vmm.failure = FerryError(Reason.VMM_FAILED, "sealed")
    await vmm.asks(asking_for(0))
    await delivered.until_faults(0)
    vmm.door.settled(0, 1, Settled.ZERO)
    assert delivered.failures == [vmm.failure]
    vmm.is_not_answered()


async def test_it_is_finished_when_the_vmm_hangs_up_with_all_its_memory(vmm: Vmm, delivered: Delivered) -> None:
    vmm.door.settled(0, 8, Settled.INSTALLED)
    waiting = asyncio.create_task(vmm.door.finished())
    await vmm.asks(asking_for(7))
    await delivered.until_faults(7)
    vmm.door.settled(7, 1, Settled.PRESENT)
    await vmm.is_answered(OK)
    assert not waiting.done()
    vmm.end.close()
    await asyncio.wait_for(waiting, DEADLINE)
    assert not delivered.failures


async def test_the_last_pages_may_be_settled_just_after_the_vmm_hung_up(vmm: Vmm, delivered: Delivered) -> None:
    vmm.door.settled(0, 7, Settled.INSTALLED)
    vmm.end.close()
    await asyncio.sleep(0)
    vmm.door.drain()
    vmm.door.settled(7, 1, Settled.POISONED)
    await asyncio.wait_for(vmm.door.finished(), DEADLINE)
    assert not delivered.failures


async def test_a_vmm_that_hangs_up_early_fails_the_door(
    vmm: Vmm, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_door, "_HANG_UP_SECONDS", 0.01)
    vmm.door.settled(0, 7, Settled.INSTALLED)
    vmm.end.close()
    await delivered.next()
    assert [error.reason for error in delivered.failures if isinstance(error, FerryError)] == [Reason.VMM_FAILED]


@pytest.mark.parametrize("missing", [0, 1])
async def test_a_closed_door_minds_no_hang_up(
    vmm: Vmm, delivered: Delivered, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_door, "_HANG_UP_SECONDS", 0.01)
    vmm.door.settled(0, 8 - missing, Settled.INSTALLED)
    vmm.end.close()
    vmm.door.drain()
    vmm.door.close()
    await asyncio.sleep(0.05)
    assert not delivered.failures


async def test_a_vmm_that_is_gone_when_it_is_answered_has_hung_up(
    vmm: Vmm, delivered: Delivered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_door, "_HANG_UP_SECONDS", 0.01)
    await vmm.asks(asking_for(0))
    await delivered.until_faults(0)
    vmm.end.close()
    vmm.door.settled(0, 8, Settled.INSTALLED)
    await asyncio.wait_for(vmm.door.finished(), DEADLINE)
    assert not delivered.failures


async def test_what_the_pager_cannot_take_fails_the_door(vmm: Vmm, delivered: Delivered) -> None:
    def refuse(_events: DoorEvents) -> None:
        raise FerryError(Reason.INTERNAL, "no")

    vmm.door.close()
    vmm.door.open(refuse, delivered.fail)
    await vmm.asks(asking_for(0))
    await delivered.next()
    assert len(delivered.failures) == 1
