"""Deliveries on a fault stream: to the fault that waits for one of their pages, or ahead of any."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pageferry.v1 import fault_pb2 as pb
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.fault_stream import FaultStream
from pageferryd.destination.imports import Delivery

# Pages 0 to 7 lie above pages 8 to 107.
HIGH = 1 << 40
LAYOUT = Layout([Region(HIGH, 8 * PAGE_SIZE), Region(0, 100 * PAGE_SIZE)])


class Context:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written: list[pb.ResolveFaultsResponse] = []

    async def write(self, response: pb.ResolveFaultsResponse) -> None:
        self.written.append(response)


class Line:
    def __init__(self) -> None:
        self.door = ExitDoor(LAYOUT)
        self.faulted: list[int] = []
        self.door.open(self._take, lambda _error: None)
        self.stream = FaultStream(self.door)

    def _take(self, events: DoorEvents) -> None:
        self.faulted += events.faults

    def fault(self, token: int, page: int, pages: int = 1) -> None:
        piece = next(LAYOUT.pieces(page, 1))
        address = LAYOUT.regions[piece.region].guest_address + piece.first * PAGE_SIZE
        self.stream.take(pb.ResolveFaultsRequest(token=token, guest_address=address, size=pages * PAGE_SIZE))

    async def written(self) -> list[Any]:
        context = Context()
        writing = asyncio.create_task(self.stream.write_to(context))  # type: ignore[arg-type]
        for _ in range(5):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        return context.written


@pytest.fixture
def line() -> Line:
    return Line()


async def test_a_delivery_that_nobody_waits_for_has_no_token(line: Line) -> None:
    line.stream.deliver(Delivery((9,), b"bytes"))
    assert await line.written() == [
        pb.ResolveFaultsResponse(
            guest_address=PAGE_SIZE,
            size=PAGE_SIZE,
            outcome=pb.OUTCOME_DELIVERED,
            sharing=pb.SHARING_PRIVATE,
            payload=b"bytes",
        )
    ]


async def test_a_bundle_names_all_of_its_pages_wherever_they_lie(line: Line) -> None:
    line.stream.deliver(Delivery((9, 3, 107), b"p", b"m", 7, (1 << 64) - 1))
    (response,) = await line.written()
    assert list(response.bundle_addresses) == [PAGE_SIZE, HIGH + 3 * PAGE_SIZE, 99 * PAGE_SIZE]
    assert (response.guest_address, response.size) == (PAGE_SIZE, PAGE_SIZE)
    assert (response.payload, response.metadata, response.stream, response.epoch) == (b"p", b"m", 7, (1 << 64) - 1)


async def test_a_pending_bundle_has_no_payload(line: Line) -> None:
    line.stream.deliver(Delivery((9,), b"", b"m"))
    (response,) = await line.written()
    assert (list(response.bundle_addresses), response.payload, response.metadata) == ([PAGE_SIZE], b"", b"m")


async def test_the_fault_that_waits_for_any_page_of_a_bundle_gets_it(line: Line) -> None:
    line.fault(5, 3)
    line.stream.deliver(Delivery((9, 3, 107), b"p", b"m"))
    (response,) = await line.written()
    assert response.token == 5
    # Still the bundle's first page: the token tells which fault it answers.
    assert response.guest_address == PAGE_SIZE
    # It is answered: its import is none of its business any more.
    line.door.settled(3, 1, Settled.INSTALLED)
    assert await line.written() == []
    # And its token is free.
    line.fault(5, 4)
    assert line.faulted == [3, 4]


async def test_others_that_wait_are_answered_when_the_import_is_reported(line: Line) -> None:
    line.fault(1, 3)
    line.fault(2, 3)
    line.fault(3, 107)
    line.stream.deliver(Delivery((9, 3, 107), b"p", b"m"))
    (delivered,) = await line.written()
    assert delivered.token == 1
    line.door.settled(107, 1, Settled.INSTALLED)
    line.door.settled(3, 1, Settled.INSTALLED)
    assert [(one.token, one.outcome) for one in await line.written()] == [
        (3, pb.OUTCOME_INSTALLED), (2, pb.OUTCOME_INSTALLED),
    ]  # fmt: skip


async def test_a_fault_over_several_pages_waits_for_all_of_their_imports(line: Line) -> None:
    line.fault(1, 10, pages=2)
    line.stream.deliver(Delivery((10, 11), b"p", b"m"))
    (delivered,) = await line.written()
    assert delivered.token == 0
    line.door.settled(10, 1, Settled.INSTALLED)
    assert await line.written() == []
    line.door.settled(11, 1, Settled.ZERO)
    (answer,) = await line.written()
    assert (answer.token, answer.outcome, answer.size) == (1, pb.OUTCOME_INSTALLED, 2 * PAGE_SIZE)


async def test_a_page_that_was_converted_before_its_bundle_came_has_no_token_left(line: Line) -> None:
    line.fault(1, 3)
    line.door.settled(3, 1, Settled.ZERO)
    line.stream.deliver(Delivery((3, 4), b"p", b"m"))
    assert [(one.token, one.outcome) for one in await line.written()] == [
        (1, pb.OUTCOME_ZERO), (0, pb.OUTCOME_DELIVERED),
    ]  # fmt: skip


async def test_deliveries_leave_in_the_order_in_which_they_came(line: Line) -> None:
    for epoch in range(50):
        line.stream.deliver(Delivery((9, 10), b"", b"m", 0, epoch))
    assert [one.epoch for one in await line.written()] == list(range(50))
