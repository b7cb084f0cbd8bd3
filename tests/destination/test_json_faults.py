"""vCPU faults as JSON on the hand-off's socket: the bytes of Firecracker's branch, however they are cut."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarding_vmm import DEADLINE, HandSession
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination import json_faults
from pageferryd.destination.door import Settled
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.json_faults import JsonFaults

LAYOUT = Layout([Region(1 << 32, 16 * PAGE_SIZE), Region(0, 48 * PAGE_SIZE)])


class Line:
    """The hand-off's connection between a VMM and its pager, of which the test settles the pages."""

    def __init__(self) -> None:
        self.here, self.vmm = socket.socketpair()
        self.here.setblocking(False)
        self.vmm.setblocking(False)
        self.door = ExitDoor(LAYOUT)
        self.session = HandSession(self.door)
        self.faults = JsonFaults(self.here, self.door, LAYOUT)
        self.faults.open()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE):
            await asyncio.get_running_loop().sock_sendall(self.vmm, data)

    async def replies(self, count: int) -> bytes:
        """Return the bytes of as many replies, and nothing behind them."""
        data = b""
        async with asyncio.timeout(DEADLINE):
            while data.count(b"}") < count:
                data += await asyncio.get_running_loop().sock_recv(self.vmm, 65536)
        return data

    async def closed(self) -> None:
        """Wait until the pager listens no longer."""
        async with asyncio.timeout(DEADLINE):
            while self.faults._loop is not None:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self.faults.close()
        self.faults.close()
        self.here.close()
        self.vmm.close()


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    one = Line()
    yield one
    one.close()


def request(page: int, vcpu: int = 0, flags: int = 0, token: int | None = None) -> bytes:
    fields = {"vcpu": vcpu, "offset": page * PAGE_SIZE, "flags": flags, "token": token}
    return json.dumps(fields, separators=(",", ":")).encode()


def reply(page: int, vcpu: int = 0, flags: int = 0, token: int | None = None, *, zero: bool = False) -> bytes:
    fields = {"vcpu": vcpu, "token": token, "offset": page * PAGE_SIZE, "len": PAGE_SIZE, "flags": flags, "zero": zero}
    return json.dumps(fields, separators=(",", ":")).encode()


async def test_a_reply_is_what_firecracker_reads_byte_for_byte(line: Line) -> None:
    await line.send(b'{"vcpu":3,"offset":69632,"flags":16,"token":null}')
    await line.session.until(1)
    assert line.session.faults == [17]
    line.door.settled(17, 1, Settled.INSTALLED)
    assert await line.replies(1) == b'{"vcpu":3,"token":null,"offset":69632,"len":4096,"flags":16,"zero":false}'


@pytest.mark.parametrize(("how", "zero"), [(Settled.INSTALLED, False), (Settled.ZERO, True), (Settled.PRESENT, False)])
async def test_only_a_page_that_was_placed_as_zeroes_is_told_as_zero(line: Line, how: Settled, zero: bool) -> None:
    await line.send(request(5, 1, 2, 3))
    await line.session.until(1)
    line.door.settled(5, 1, how)
    assert await line.replies(1) == reply(5, 1, 2, 3, zero=zero)


async def test_objects_stand_back_to_back_and_replies_come_as_pages_do(line: Line) -> None:
    await line.send(b"".join(request(page, vcpu=page) for page in range(40)))
    await line.session.until(40)
    for page in reversed(range(40)):
        line.door.settled(page, 1, Settled.INSTALLED)
    assert await line.replies(40) == b"".join(reply(page, vcpu=page) for page in reversed(range(40)))


FAULTS = st.tuples(
    st.integers(0, LAYOUT.page_count - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.none() | st.integers(0, 2**32 - 1),
)


@settings(max_examples=40, deadline=None)
@given(faults=st.lists(FAULTS, min_size=1, max_size=6), data=st.data(), gap=st.sampled_from([b"", b" ", b"\n\t "]))
async def test_wherever_the_bytes_are_cut_every_fault_is_taken_once(
    faults: list[tuple[int, int, int, int | None]], data: st.DataObject, gap: bytes
) -> None:
    message = gap.join(request(*fault) for fault in faults) + gap
    cuts = sorted(data.draw(st.lists(st.integers(0, len(message)), max_size=12)))
    line = Line()
    try:
        for start, stop in zip([0, *cuts], [*cuts, len(message)], strict=True):
            await line.send(message[start:stop])
            # One turn of the loop: the pager reads this piece by itself.
            await asyncio.sleep(0)
        await line.session.until(len(faults))
        assert line.session.faults == [fault[0] for fault in faults]
        line.door.settled(0, LAYOUT.page_count, Settled.INSTALLED)
        found = await line.replies(len(faults))
        assert sorted(found.replace(b"}{", b"}\n{").split(b"\n")) == sorted(reply(*fault) for fault in faults)
    finally:
        line.close()


async def test_a_fault_cut_at_every_byte_is_taken(line: Line) -> None:
    for number in request(9, 8, 7, 6):
        await line.send(bytes([number]))
        await asyncio.sleep(0)
    await line.session.until(1)
    assert line.session.faults == [9]


async def test_fields_that_are_not_known_do_no_harm_and_an_address_within_a_page_is_its_page(line: Line) -> None:
    await line.send(b'{"future":{"a":[1,"}{"]},"vcpu":0,"offset":4097,"flags":0}')
    await line.session.until(1)
    line.door.settled(1, 1, Settled.ZERO)
    assert await line.replies(1) == reply(1, zero=True)


NONSENSE = {
    "no JSON": b"hello",
    "an array": b"[1,2]",
    "a number": b"12 ",
    "the end of an object": b"}",
    "bytes that are no text": b"\xff\xfe",
    "no fields": b"{}",
    "no vCPU": b'{"offset":0,"flags":0}',
    "an offset that is text": b'{"vcpu":0,"offset":"0","flags":0}',
    "an offset that is a fraction": b'{"vcpu":0,"offset":4096.0,"flags":0}',
    "an offset that is true": b'{"vcpu":0,"offset":true,"flags":0}',
    "a negative offset": b'{"vcpu":0,"offset":-4096,"flags":0}',
    "an offset beyond the guest": request(64),
    "an offset beyond 64 bits": b'{"vcpu":0,"offset":18446744073709551616,"flags":0}',
    "a vCPU beyond 32 bits": b'{"vcpu":4294967296,"offset":0,"flags":0}',
    "a token that is no number": b'{"vcpu":0,"offset":0,"flags":0,"token":"' + b"x" * 3000 + b'"}',
    "a poison that is a number": b'{"vcpu":0,"offset":0,"flags":0,"poison":1}',
    "a number without an end": b'{"vcpu":' + b"9" * 5000,
    "an object without an end": b'{"vcpu":0,"x":"' + b"y" * 5000,
    "objects without an end": b'{"a":' * 20_000,
}


@pytest.mark.parametrize("case", NONSENSE)
async def test_what_cannot_be_a_fault_ends_the_listening_and_nothing_else(line: Line, case: str) -> None:
    await line.send(request(3))
    await line.session.until(1)
    await line.send(NONSENSE[case])
    await line.closed()
    assert line.session.faults == [3]
    assert not line.session.failures
    # The page that is waited for arrives all the same, and its door knows nobody to tell.
    line.door.settled(3, 1, Settled.INSTALLED)
    assert not line.door._waiting


async def test_a_vmm_whose_fault_is_refused_sees_the_end_of_the_answers(line: Line) -> None:
    await line.send(request(3))
    await line.session.until(1)
    line.door.settled(3, 1, Settled.INSTALLED)
    await line.send(request(64))
    await line.closed()
    # What was settled before that is told yet.
    assert await line.replies(1) == reply(3)
    async with asyncio.timeout(DEADLINE):
        assert await asyncio.get_running_loop().sock_recv(line.vmm, 1) == b""


async def test_faults_that_came_before_a_refused_one_are_taken(line: Line) -> None:
    await line.send(request(3) + request(4) + request(64) + request(5))
    await line.closed()
    assert line.session.faults == [3, 4]


async def test_faults_that_are_there_together_are_delivered_together(line: Line) -> None:
    first: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    line.door.open(lambda events: first.set_result(list(events.faults)), line.session.failures.append)
    # One send: there is no moment at which the pager could see only some of them.
    line.vmm.send(request(3) + request(9) + request(3))
    assert await asyncio.wait_for(first, DEADLINE) == [3, 9, 3]


async def test_answers_of_one_turn_of_the_loop_are_sent_together(line: Line) -> None:
    await line.send(b"".join(request(page) for page in range(64)))
    await line.session.until(64)
    line.door.settled(0, 32, Settled.INSTALLED)
    line.door.settled(32, 32, Settled.ZERO)
    # Nothing has gone out within the turn.
    with pytest.raises(BlockingIOError):
        line.vmm.recv(1)
    assert (await line.replies(64)).count(b'"zero":true') == 32


async def test_a_poisoned_page_is_told_to_a_vmm_that_asks_for_it(line: Line) -> None:
    await line.send(b'{"vcpu":3,"offset":4096,"flags":0,"token":7,"poison":true}')
    await line.send(b'{"vcpu":3,"offset":8192,"flags":0,"token":8,"poison":true}')
    await line.session.until(2)
    line.door.settled(1, 1, Settled.POISONED)
    line.door.settled(2, 1, Settled.INSTALLED)
    poisoned = b'{"vcpu":3,"token":7,"offset":4096,"len":4096,"flags":0,"zero":false,"poisoned":true}'
    assert await line.replies(2) == poisoned + reply(2, 3, 0, 8)


async def test_a_poisoned_page_gets_no_reply_without_that_word(line: Line) -> None:
    await line.send(request(1) + request(2))
    await line.session.until(2)
    line.door.settled(1, 1, Settled.POISONED)
    line.door.settled(2, 1, Settled.INSTALLED)
    assert await line.replies(1) == reply(2)


async def test_replies_that_the_vmm_reads_late_are_kept_and_complete(line: Line) -> None:
    async def ask() -> None:
        for start in range(0, 4000, 64):
            await line.send(b"".join(request(page) for page in range(64)))
            await line.session.until(start + 64)
            line.door.settled(0, 64, Settled.INSTALLED)

    await asyncio.wait_for(ask(), DEADLINE)
    assert line.faults._unsent
    assert await line.replies(4032) == b"".join(reply(page) for page in range(64)) * 63
    assert not line.faults._unsent


async def test_a_vmm_that_reads_no_replies_is_not_listened_to_for_ever(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_faults, "MAX_UNSENT", 10_000)
    faults = 0
    while line.faults._loop is not None and faults < 100_000:
        await line.send(request(0) * 64)
        faults += 64
        await line.session.until(faults)
        line.door.settled(0, 1, Settled.INSTALLED)
    assert line.faults._loop is None
    assert len(line.faults._unsent) < 20_000


async def test_a_vmm_that_hangs_up_is_no_longer_listened_to(line: Line) -> None:
    await line.send(request(1))
    await line.session.until(1)
    line.vmm.close()
    await line.closed()
    line.door.settled(1, 1, Settled.INSTALLED)


async def test_a_vmm_that_dies_before_its_reply_harms_nobody(line: Line) -> None:
    await line.send(request(1))
    await line.session.until(1)
    line.vmm.shutdown(socket.SHUT_RD)
    line.door.settled(1, 1, Settled.INSTALLED)
    await line.closed()


async def test_closed_it_listens_no_more_and_leaves_the_connection_open(line: Line) -> None:
    line.faults.close()
    await line.send(request(1))
    await asyncio.sleep(0)
    assert line.session.faults == []
    line.here.send(b"x")
