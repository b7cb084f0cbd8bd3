"""What every fault door does, whatever its guest: a subclass gives the fixture `house`."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Protocol

from pageferryd.core.figures import DOORS
from pageferryd.destination.door import DoorEvents, FaultDoor, Settled

DEADLINE = 10.0


class House(Protocol):
    """A door, closed yet, and a guest of 8 pages behind it, all of them missing."""

    door: FaultDoor

    def touch(self, page: int) -> Future[bytes]:
        """Read the first byte of a page in the guest, which waits until the page is there."""

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

    async def test_a_door_that_listens_answers_who_waits_when_the_page_is_settled(
        self, house: House, delivered: Delivered
    ) -> None:
        house.door.open(delivered.take, delivered.fail)
        readings = [house.touch(page) for page in (4, 5)]
        await delivered.until_faults(4, 5)
        house.install(4)
        house.door.settled(4, 1, Settled.INSTALLED)
        assert await asyncio.wait_for(asyncio.wrap_future(readings[0]), DEADLINE) == b"\0"
        assert not readings[1].done()
        # Nobody waits for it any more.
        house.door.settled(4, 1, Settled.PRESENT)
        house.install(5)
        house.door.settled(0, 8, Settled.ZERO)
        await asyncio.wait_for(asyncio.wrap_future(readings[1]), DEADLINE)
