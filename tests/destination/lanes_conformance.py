"""What all lanes do, whatever carries them: a subclass gives the fixture `link`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import pytest
from guarded import content, contents

from pageferry.errors import FerryError, Reason
from pageferryd.core.checksums import checksums_of, damaged_pages
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.runs import RAW, ZERO, Run, decode
from pageferryd.destination.lanes import LaneOpener, Lanes

T = TypeVar("T")
DEADLINE = 10.0
PAGES = 64
HOLE = 40
"""From this page on the guest is empty."""
LOSSES = {Reason.LANE_LOST, Reason.SOURCE_UNREACHABLE}


class Link(Protocol):
    """A source that serves PAGES pages in one region, `content` below HOLE and nothing above, and the way to it."""

    def opener(self, *, migration: str = "m", token: bytes | None = None, layout: Layout | None = None) -> LaneOpener:
        """Return an opener that says what the source wants to hear, but for what is given."""

    def stranger(self) -> LaneOpener:
        """Return an opener of somebody whom the guest was not sent to, or skip where nobody proves a name."""

    def carry_checksums(self) -> None:
        """Make every page carry its checksum, on lanes that are opened from now on."""

    def close_memory(self) -> None:
        """Make the guest run at the source still."""

    async def cut(self) -> None:
        """Break the connections and each new one, without a word."""

    async def heal(self) -> None:
        """Let connections through again."""

    async def stop_source(self) -> None:
        """End the source's server."""

    @property
    def released(self) -> bool:
        """Whether the source has let its memory go."""


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, DEADLINE)


async def reason_of(awaitable: Awaitable[object]) -> Reason:
    with pytest.raises(FerryError) as refused:
        await soon(awaitable)
    return refused.value.reason


async def write_until_lost(write: Callable[..., Awaitable[None]], *arguments: object) -> Reason:
    """Write until the loss shows: what is written first may go nowhere without a word."""

    async def write_on() -> None:
        while True:
            await write(*arguments)
            await asyncio.sleep(0)

    return await reason_of(write_on())


async def pushed_until_last(lanes: Lanes) -> tuple[list[Run], bytes]:
    runs: list[Run] = []
    data = b""
    while True:
        batch = decode(await soon(lanes.pushed()))
        runs += batch.runs
        data += batch.message[
            batch.offset : batch.offset + sum(r.pages for r in batch.runs if r.kind == RAW) * PAGE_SIZE
        ]
        if batch.last:
            return runs, data


class LanesConformance:
    @pytest.fixture
    async def lanes(self, link: Link) -> Lanes:
        return await link.opener().open()

    async def test_pages_come_as_they_are_at_the_source(self, lanes: Lanes) -> None:
        await lanes.fetch([(3, 2), (HOLE, 1)])
        batch = decode(await soon(lanes.fetched()))
        assert batch.runs == [Run(3, 2, RAW), Run(HOLE, 1, ZERO)]
        assert batch.message[batch.offset : batch.offset + 2 * PAGE_SIZE] == contents(3, 2)
        await lanes.close()

    async def test_many_requests_may_be_under_way_and_are_answered_in_order(self, lanes: Lanes) -> None:
        pages = [(7 * number) % HOLE for number in range(100)]
        for page in pages:
            await lanes.fetch([(page, 1)])
        for page in pages:
            batch = decode(await soon(lanes.fetched()))
            assert batch.runs == [Run(page, 1, RAW)]
            assert batch.message[batch.offset : batch.offset + PAGE_SIZE] == content(page)
        await lanes.close()

    async def test_each_push_is_answered_to_its_last_before_the_next(self, lanes: Lanes) -> None:
        await lanes.push([(0, 8), (20, 4)], 12 * PAGE_SIZE)
        await lanes.push([(HOLE, PAGES - HOLE)], PAGE_SIZE)

        runs, data = await pushed_until_last(lanes)
        assert [(run.first, run.pages, run.kind) for run in runs] == [(0, 8, RAW), (20, 4, RAW)]
        assert data == contents(0, 8) + contents(20, 4)
        runs, data = await pushed_until_last(lanes)
        assert runs == [Run(HOLE, PAGES - HOLE, ZERO)]
        assert data == b""
        await lanes.close()

    async def test_no_more_is_pushed_than_was_granted(self, lanes: Lanes) -> None:
        await lanes.push([(0, 30)], 5 * PAGE_SIZE)
        runs, data = await pushed_until_last(lanes)
        assert sum(run.pages for run in runs) == 5
        assert data == contents(0, 5)
        await lanes.close()

    async def test_demand_is_answered_while_a_push_goes_on(self, lanes: Lanes) -> None:
        for _ in range(50):
            await lanes.push([(0, HOLE)], HOLE * PAGE_SIZE)
        await lanes.fetch([(9, 1)])
        assert decode(await soon(lanes.fetched())).runs == [Run(9, 1, RAW)]
        for _ in range(50):
            _, data = await pushed_until_last(lanes)
            assert data == contents(0, HOLE)
        await lanes.close()

    async def test_no_page_carries_a_checksum_unless_it_is_asked_for(self, lanes: Lanes) -> None:
        assert not lanes.checksums
        await lanes.fetch([(3, 1)])
        await lanes.push([(0, 8)], 8 * PAGE_SIZE)
        for read in (lanes.fetched, lanes.pushed):
            assert decode(await soon(read()), checksums=lanes.checksums).checksums == 0
        await lanes.close()

    async def test_pages_carry_their_checksums_on_both_lanes(self, link: Link) -> None:
        link.carry_checksums()
        lanes = await link.opener().open()
        assert lanes.checksums
        await lanes.fetch([(9, 1)])
        await lanes.fetch([(3, 2), (HOLE, 1)])
        await lanes.push([(HOLE - 2, 4)], 4 * PAGE_SIZE)
        for read, first, pages in ((lanes.fetched, 9, 1), (lanes.fetched, 3, 2), (lanes.pushed, HOLE - 2, 2)):
            batch = decode(await soon(read()), checksums=lanes.checksums)
            assert batch.message[batch.checksums :][: 8 * pages] == checksums_of([contents(first, pages)])
            assert damaged_pages(batch.message, batch.offset, pages, batch.message, batch.checksums) == []
        await lanes.close()

    async def test_lanes_can_be_opened_again_beside_others(self, link: Link, lanes: Lanes) -> None:
        others = await link.opener().open()
        for each in (lanes, others):
            await each.fetch([(1, 1)])
            assert decode(await soon(each.fetched())).runs == [Run(1, 1, RAW)]
            await each.close()

    async def test_a_cut_shows_in_every_method_that_waits(self, link: Link, lanes: Lanes) -> None:
        waiting = [asyncio.create_task(reason_of(read())) for read in (lanes.fetched, lanes.pushed)]
        await asyncio.sleep(0)
        await link.cut()
        assert set(await soon(asyncio.gather(*waiting))) <= LOSSES
        # Once lost, lost for good.
        assert await reason_of(lanes.fetched()) in LOSSES
        assert await reason_of(lanes.pushed()) in LOSSES
        assert await write_until_lost(lanes.fetch, [(0, 1)]) in LOSSES
        assert await write_until_lost(lanes.push, [(0, 1)], PAGE_SIZE) in LOSSES
        assert await reason_of(lanes.complete(PAGES)) in LOSSES
        assert not link.released
        await lanes.close()

    async def test_the_end_of_the_source_is_a_loss_and_never_a_completion(self, link: Link, lanes: Lanes) -> None:
        waiting = [asyncio.create_task(reason_of(read())) for read in (lanes.fetched, lanes.pushed)]
        await asyncio.sleep(0)
        await link.stop_source()
        assert set(await soon(asyncio.gather(*waiting))) <= LOSSES
        assert await reason_of(lanes.complete(PAGES)) in LOSSES
        await lanes.close()
        assert not link.released

    async def test_what_was_asked_for_and_not_answered_is_lost_with_the_lanes(self, link: Link, lanes: Lanes) -> None:
        await lanes.fetch([(0, 1)])
        await soon(lanes.fetched())
        await link.cut()
        assert await write_until_lost(lanes.fetch, [(2, 1)]) in LOSSES
        await lanes.close()

        await link.heal()
        again = await soon(link.opener().open())
        await again.fetch([(5, 1)])
        assert decode(await soon(again.fetched())).runs == [Run(5, 1, RAW)]
        await again.close()

    async def test_nobody_can_be_reached_through_a_cut(self, link: Link) -> None:
        await link.cut()
        assert await reason_of(link.opener().open()) is Reason.SOURCE_UNREACHABLE

    async def test_nobody_can_be_reached_where_nobody_serves(self, link: Link) -> None:
        await link.stop_source()
        assert await reason_of(link.opener().open()) is Reason.SOURCE_UNREACHABLE

    async def test_a_wrong_token_is_refused_as_such(self, link: Link) -> None:
        assert await reason_of(link.opener(token=bytes(32)).open()) is Reason.TOKEN_INVALID
        assert await reason_of(link.opener(token=b"").open()) is Reason.TOKEN_INVALID

    async def test_an_unknown_migration_is_refused_as_such(self, link: Link) -> None:
        assert await reason_of(link.opener(migration="other").open()) is Reason.UNKNOWN_MIGRATION

    async def test_another_layout_than_announced_is_refused(self, link: Link) -> None:
        for size in (PAGES - 1, PAGES + 1):
            other = Layout([Region(0, size * PAGE_SIZE)])
            assert await reason_of(link.opener(layout=other).open()) is Reason.LAYOUT_MISMATCH
        moved = Layout([Region(PAGE_SIZE, PAGES * PAGE_SIZE)])
        assert await reason_of(link.opener(layout=moved).open()) is Reason.LAYOUT_MISMATCH

    async def test_a_stranger_is_refused_as_such(self, link: Link) -> None:
        assert await reason_of(link.stranger().open()) is Reason.PEER_NOT_ALLOWED

    async def test_lanes_open_while_the_guest_runs_and_give_no_page_of_it(self, link: Link) -> None:
        link.close_memory()
        lanes = await link.opener().open()
        await lanes.fetch([(0, 1)])
        assert await reason_of(lanes.fetched()) is Reason.ILLEGAL_STATE
        await lanes.push([(0, 1)], PAGE_SIZE)
        assert await reason_of(lanes.pushed()) is Reason.ILLEGAL_STATE
        await lanes.close()

    async def test_a_page_that_cannot_be_is_refused_with_its_reason(self, lanes: Lanes) -> None:
        await lanes.fetch([(PAGES, 1)])
        assert await reason_of(lanes.fetched()) is Reason.PAGE_OUT_OF_RANGE
        # A refusal stays one, for whoever asks later.
        assert await write_until_lost(lanes.fetch, [(0, 1)]) is Reason.PAGE_OUT_OF_RANGE
        assert await reason_of(lanes.fetched()) is Reason.PAGE_OUT_OF_RANGE
        await lanes.close()

    async def test_completion_lets_the_memory_go_and_may_be_repeated(self, link: Link, lanes: Lanes) -> None:
        assert not link.released
        await soon(lanes.complete(PAGES))
        assert link.released
        await soon(lanes.complete(PAGES))
        await lanes.close()
        again = await link.opener().open()
        await soon(again.complete(PAGES))
        await again.close()

    async def test_a_completion_that_does_not_count_every_page_is_refused(self, link: Link, lanes: Lanes) -> None:
        assert await reason_of(lanes.complete(PAGES - 1)) is Reason.INVALID_ARGUMENT
        assert not link.released
        await lanes.close()

    async def test_closing_says_nothing_about_the_memory(self, link: Link, lanes: Lanes) -> None:
        await lanes.fetch([(0, 1)])
        await lanes.close()
        assert not link.released
        again = await link.opener().open()
        await again.fetch([(0, 1)])
        assert decode(await soon(again.fetched())).runs == [Run(0, 1, RAW)]
        await again.close()

    async def test_who_reads_while_they_are_closed_is_told_of_a_loss(self, lanes: Lanes) -> None:
        waiting = [asyncio.create_task(reason_of(read())) for read in (lanes.fetched, lanes.pushed)]
        await asyncio.sleep(0)
        await lanes.close()
        assert set(await soon(asyncio.gather(*waiting))) <= LOSSES
        await lanes.close()

    async def test_a_reader_that_is_cancelled_is_cancelled(self, lanes: Lanes) -> None:
        reading = asyncio.create_task(lanes.fetched())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await lanes.close()
