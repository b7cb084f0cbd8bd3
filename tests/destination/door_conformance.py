"""What every fault door does, whatever its guest: a subclass gives the fixture `house`."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Protocol

import pytest

from pageferryd.core.figures import DOORS
from pageferryd.destination.door import DoorEvents, FaultDoor

DEADLINE = 10.0


class House(Protocol):
    """A door, closed yet, and a guest of 8 pages behind it, all of them missing."""

    door: FaultDoor

    def touch(self, page: int) -> Future[bytes]:
        """Read the first byte of a page in the guest, which waits until the page is there."""

    def discard(self, page: int) -> Future[None]:
        """Give a page away in the guest, which goes on when the door has taken note."""

    def wait_queued(self) -> None:
        """Wait until the door has something to deliver. Blocks."""

    def install(self, page: int) -> None:
        """Put a page of zeroes in place and wake who waits for it."""


class Delivered:
    """Takes what a door delivers."""

    def __init__(self) -> None:
        self.events: list[DoorEvents] = []
        self.failures: list[Exception] = []
        self._changed = asyncio.Event()

    def take(self, events: DoorEvents) -> None:
        self.events.append(events)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self.failures.append(error)
        self._changed.set()

    @property
    def faults(self) -> set[int]:
        return {page for events in self.events for page in events.faults}

    @property
    def discards(self) -> set[tuple[int, int]]:
        return {run for events in self.events for run in events.discards}

    async def until_faults(self, *pages: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while not self.faults.issuperset(pages):
                await self.next()

    async def next(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self._changed.wait()
        self._changed.clear()


@pytest.fixture
def delivered() -> Delivered:
    return Delivered()


class DoorConformance:
    async def test_its_name_is_one_that_metrics_know(self, house: House) -> None:
        assert house.door.name in DOORS

    async def test_a_touch_of_a_missing_page_is_delivered_with_the_time_it_was_seen(
        self, house: House, delivered: Delivered
    ) -> None:
        house.door.open(delivered.take, delivered.fail)
        reading = house.touch(3)
        await delivered.until_faults(3)

        assert not reading.done()
        assert all(events.seen > 0 for events in delivered.events)
        assert [events.seen for events in delivered.events] == sorted(events.seen for events in delivered.events)
        house.install(3)
        assert await asyncio.wrap_future(reading) == b"\0"

    async def test_every_page_that_somebody_waits_for_is_delivered(self, house: House, delivered: Delivered) -> None:
        house.door.open(delivered.take, delivered.fail)
        readings = [house.touch(page) for page in (0, 7, 2, 5)]
        await delivered.until_faults(0, 2, 5, 7)

        assert delivered.faults == {0, 2, 5, 7}
        for page in (0, 2, 5, 7):
            house.install(page)
        await asyncio.gather(*map(asyncio.wrap_future, readings))
        assert not delivered.failures

    async def test_a_touch_from_before_it_was_opened_is_delivered(self, house: House, delivered: Delivered) -> None:
        house.touch(1)
        house.wait_queued()
        house.door.open(delivered.take, delivered.fail)
        await delivered.until_faults(1)
        house.install(1)

    async def test_drain_delivers_what_is_queued_before_it_returns(self, house: House, delivered: Delivered) -> None:
        house.door.open(delivered.take, delivered.fail)
        house.touch(4)
        house.wait_queued()
        house.door.drain()

        assert delivered.faults == {4}
        house.install(4)

    async def test_drain_with_nothing_queued_delivers_nothing(self, house: House, delivered: Delivered) -> None:
        house.door.open(delivered.take, delivered.fail)
        house.door.drain()
        assert delivered.events == []

    async def test_a_discard_is_delivered_and_lets_the_guest_go_on(self, house: House, delivered: Delivered) -> None:
        house.door.open(delivered.take, delivered.fail)
        discarding = house.discard(6)
        await asyncio.wait_for(asyncio.wrap_future(discarding), DEADLINE)
        assert delivered.discards == {(6, 1)}

    async def test_a_closed_door_delivers_nothing_and_the_guest_waits_on(
        self, house: House, delivered: Delivered
    ) -> None:
        house.door.open(delivered.take, delivered.fail)
        house.door.close()
        reading = house.touch(2)
        house.wait_queued()
        house.door.drain()
        await asyncio.sleep(0)

        assert delivered.events == []
        assert not delivered.failures
        assert not reading.done()
        house.install(2)
        assert await asyncio.wrap_future(reading) == b"\0"

    async def test_closing_twice_or_before_opening_does_nothing(self, house: House, delivered: Delivered) -> None:
        house.door.close()
        house.door.open(delivered.take, delivered.fail)
        house.door.close()
        house.door.close()
        assert not delivered.failures

    async def test_what_its_taker_cannot_do_is_reported_once_as_a_failure(
        self, house: House, delivered: Delivered
    ) -> None:
        from pageferry.errors import FerryError, Reason

        def refuse(_events: DoorEvents) -> None:
            raise FerryError(Reason.VMM_GONE, "the VMM ended")

        house.door.open(refuse, delivered.fail)
        house.touch(0)
        await delivered.next()
        house.touch(1)
        house.wait_queued()
        house.door.drain()

        (failure,) = delivered.failures
        assert str(failure) == "the VMM ended"
        house.install(0)
        house.install(1)
