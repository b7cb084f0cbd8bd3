"""Asking for opaque pages: what the guest waits for first, nothing twice, nothing lost, no more than there is room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import page_pb2
from pageferryd.destination.exports import MAX_PAGES, Exports

PAGES = 2000
DEADLINE = 10.0


def bundle(*pages: int, **fields: Any) -> page_pb2.PageBundle:
    return page_pb2.PageBundle(pages=pages, **fields)


class HandLanes:
    """Requests wait until the test answers them."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self._answers: list[asyncio.Future[Sequence[page_pb2.PageBundle]]] = []
        self._changed = asyncio.Event()

    async def export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        self.asked.append(list(pages))
        self._answers.append(asyncio.get_running_loop().create_future())
        self._changed.set()
        return await self._answers[-1]

    async def until(self, requests: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while len(self.asked) < requests:
                self._changed.clear()
                await self._changed.wait()

    def answer(self, request: int, *bundles: page_pb2.PageBundle) -> None:
        self._answers[request].set_result(bundles)

    def refuse(self, request: int, error: Exception) -> None:
        self._answers[request].set_exception(error)


class Desk:
    """The room that there is, and what was delivered."""

    def __init__(self) -> None:
        self.room = 10_000
        self.urgent_room = 10_000
        self.delivered: list[list[int]] = []
        self.lanes = HandLanes()
        self.runs = True
        self.exports = Exports(PAGES, lambda one: self.delivered.append(list(one.pages)), self._has_room)
        self._workers: list[asyncio.Task[None]] = []

    def _has_room(self, pages: int, *, urgent: bool = False) -> bool:
        return pages <= (self.urgent_room if urgent else self.room)

    def start(self) -> None:
        workers = self.exports.workers(self.lanes, lambda: self.runs)  # type: ignore[arg-type]
        self._workers = [asyncio.create_task(worker) for worker in workers]

    async def failure(self) -> FerryError:
        """Wait until a worker has failed."""
        done, _ = await asyncio.wait(self._workers, timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
        (failed,) = done
        error = failed.exception()
        assert isinstance(error, FerryError)
        return error

    async def stop(self) -> None:
        """As when the lanes are lost."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self.exports.lost()

    async def idle(self) -> None:
        """Let all workers go as far as they can."""
        for _ in range(10):
            await asyncio.sleep(0)

    def add(self, *pages: int, urgent: bool = False) -> None:
        for page in pages:
            self.exports.add(page, urgent=urgent)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    one = Desk()
    one.start()
    yield one
    await one.stop()


async def test_what_is_wanted_is_asked_for_in_one_request(desk: Desk) -> None:
    desk.add(7, 3, 900)
    await desk.lanes.until(1)
    assert desk.lanes.asked == [[3, 7, 900]]
    desk.lanes.answer(0, bundle(3, 900), bundle(7))
    await desk.idle()
    assert desk.delivered == [[3, 900], [7]]
    assert desk.lanes.asked == [[3, 7, 900]]


async def test_a_request_is_bounded_and_the_next_goes_on_behind_it(desk: Desk) -> None:
    desk.add(*range(500, 1500))
    await desk.lanes.until(1)
    assert desk.lanes.asked[0] == list(range(500, 500 + MAX_PAGES))
    desk.add(0)
    desk.lanes.answer(0, *[bundle(page) for page in desk.lanes.asked[0]])
    await desk.lanes.until(2)
    assert desk.lanes.asked[1] == list(range(500 + MAX_PAGES, 500 + 2 * MAX_PAGES))


async def test_what_the_guest_waits_for_is_asked_for_by_itself_though_it_was_named_before(desk: Desk) -> None:
    desk.add(*range(600))
    await desk.lanes.until(1)
    desk.add(590, 333, urgent=True)
    await desk.lanes.until(2)
    assert desk.lanes.asked[1] == [590, 333]
    desk.lanes.answer(1, bundle(590, 333))
    desk.lanes.answer(0, *[bundle(page) for page in desk.lanes.asked[0]])
    await desk.lanes.until(3)
    # The rest goes on behind it.
    assert desk.lanes.asked[2] == list(range(334, 590))
    assert desk.delivered[0] == [590, 333]


async def test_before_the_guest_runs_requests_go_one_at_a_time(desk: Desk) -> None:
    desk.runs = False
    desk.add(5, urgent=True)
    await desk.lanes.until(1)
    desk.add(4, urgent=True)
    desk.add(6)
    await desk.idle()
    assert desk.lanes.asked == [[5]]
    desk.runs = True
    desk.exports.wake()
    await desk.lanes.until(2)
    assert desk.lanes.asked == [[5], [4]]


async def test_a_page_under_way_is_not_asked_for_again_until_it_has_come(desk: Desk) -> None:
    desk.add(5)
    await desk.lanes.until(1)
    desk.add(5, urgent=True)
    desk.add(5)
    await desk.idle()
    assert len(desk.lanes.asked) == 1
    desk.lanes.answer(0, bundle(5))
    await desk.idle()
    # Its import has failed.
    desk.add(5)
    await desk.lanes.until(2)
    assert desk.lanes.asked == [[5], [5]]


async def test_what_a_bundle_brings_beside_is_not_asked_for(desk: Desk) -> None:
    desk.add(*range(300))
    await desk.lanes.until(1)
    desk.add(299, urgent=True)
    await desk.lanes.until(2)
    desk.lanes.answer(1, bundle(299, *range(256, 298)))
    await desk.idle()
    desk.lanes.answer(0, *[bundle(page) for page in range(256)])
    await desk.lanes.until(3)
    assert desk.lanes.asked[2] == [298]


async def test_what_was_converted_is_not_asked_for(desk: Desk) -> None:
    desk.runs = False
    desk.add(0)
    await desk.lanes.until(1)
    desk.add(1, 2, 3)
    desk.add(4, 5, urgent=True)
    desk.exports.drop(2, 3)
    desk.lanes.answer(0, bundle(0))
    await desk.lanes.until(2)
    desk.lanes.answer(1, bundle(5))
    await desk.lanes.until(3)
    assert desk.lanes.asked[1:] == [[5], [1]]


async def test_nothing_is_asked_for_without_room_but_what_the_guest_waits_for(desk: Desk) -> None:
    desk.room = 0
    desk.add(1, 2)
    await desk.idle()
    assert desk.lanes.asked == []
    desk.add(2, urgent=True)
    await desk.lanes.until(1)
    assert desk.lanes.asked == [[2]]
    desk.lanes.answer(0, bundle(2))
    await desk.idle()
    assert len(desk.lanes.asked) == 1
    desk.room = 1
    desk.exports.wake()
    await desk.lanes.until(2)
    assert desk.lanes.asked == [[2], [1]]


async def test_even_that_has_its_bound(desk: Desk) -> None:
    desk.room = desk.urgent_room = 0
    desk.add(2, urgent=True)
    await desk.idle()
    assert desk.lanes.asked == []
    desk.urgent_room = 1
    desk.exports.wake()
    await desk.lanes.until(1)


async def test_a_bundle_waits_until_there_is_room_for_all_of_it(desk: Desk) -> None:
    desk.room = 3
    desk.add(1, 2, 3, 4)
    await desk.lanes.until(1)
    desk.lanes.answer(0, bundle(1, 2), bundle(3, 4, 5, 6), bundle(7))
    await desk.idle()
    assert desk.delivered == [[1, 2]]
    desk.room = 4
    desk.exports.wake()
    await desk.idle()
    assert desk.delivered == [[1, 2], [3, 4, 5, 6], [7]]


async def test_what_waits_for_room_has_more_once_the_guest_waits_for_it(desk: Desk) -> None:
    desk.room = 1
    desk.add(1, 2, 3)
    await desk.lanes.until(1)
    desk.lanes.answer(0, bundle(1, 2), bundle(3))
    await desk.idle()
    assert desk.delivered == []
    desk.add(3, urgent=True)
    await desk.idle()
    # With what came before it: bundles of one answer stay in their order.
    assert desk.delivered == [[1, 2], [3]]


async def test_after_a_loss_nothing_of_before_is_asked_for_and_nobody_asks_on_the_old_lanes(desk: Desk) -> None:
    desk.add(*range(300))
    await desk.lanes.until(1)
    await desk.stop()
    old, desk.lanes = desk.lanes, HandLanes()
    desk.start()
    await desk.idle()
    assert desk.lanes.asked == []
    desk.add(0, 299)
    await desk.lanes.until(1)
    assert [sorted(pages) for pages in desk.lanes.asked] == [[0, 299]]
    assert len(old.asked) == 1


async def test_after_a_failure_less_is_asked_for_and_then_more_again(desk: Desk) -> None:
    sizes = []
    for _ in range(5):
        desk.add(*range(PAGES))
        await desk.lanes.until(1)
        sizes.append(len(desk.lanes.asked[0]))
        desk.lanes.refuse(0, FerryError(Reason.VMM_FAILED, "too large"))
        assert (await desk.failure()).reason is Reason.VMM_FAILED
        await desk.stop()
        desk.lanes = HandLanes()
        desk.start()
    assert sizes == [256, 64, 16, 4, 1]
    desk.add(*range(PAGES))
    for request in range(10):
        await desk.lanes.until(request + 1)
        desk.lanes.answer(request, *[bundle(page) for page in desk.lanes.asked[request]])
    assert [len(pages) for pages in desk.lanes.asked[:10]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]


@pytest.mark.parametrize(
    "bundles",
    [
        [],
        [bundle(1)],
        [bundle(1, 2), bundle()],
        [bundle(1, 2, 2)],
        [bundle(1, 2, PAGES)],
        [bundle(1, 2, (1 << 64) - 1)],
        [bundle(*range(513))],
        [bundle(1, 2, payload=bytes((4 << 20) + 1))],
        [bundle(1, 2, metadata=bytes((1 << 20) + 1))],
    ],
    ids=["none", "too few", "empty", "twice", "outside", "far outside", "too many", "payload", "metadata"],
)
async def test_bundles_that_cannot_be_are_refused_and_none_delivered(
    desk: Desk, bundles: list[page_pb2.PageBundle]
) -> None:
    desk.add(1, 2)
    await desk.lanes.until(1)
    desk.lanes.answer(0, *bundles)
    assert (await desk.failure()).reason is Reason.MALFORMED_PAGES
    assert desk.delivered == []


async def test_the_largest_bundle_is_taken(desk: Desk) -> None:
    desk.add(1)
    await desk.lanes.until(1)
    desk.lanes.answer(0, bundle(*range(512), payload=bytes(4 << 20), metadata=bytes(1 << 20)))
    await desk.idle()
    assert desk.delivered == [list(range(512))]
