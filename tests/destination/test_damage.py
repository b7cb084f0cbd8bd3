"""Pages that come damaged are not put in place: they are missing again, and too many of them end the connection."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from guarded import HUGE, content, contents
from scripted_installer import ZEROES, ScriptedInstaller

from pageferry.errors import FerryError, Reason
from pageferryd.core.checksums import checksums_of
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.core.runs import POISONED, PRIVATE, RAW, WITH_BYTES, ZERO, Batch, Run, decode, encode
from pageferryd.destination.arrivals import ArrivalMap
from pageferryd.destination.damage import MOST_AT_ONCE, MOST_IN_A_ROW
from pageferryd.destination.imports import Delivery
from pageferryd.destination.installer import Placed
from pageferryd.destination.placer import SLICE_PAGES, Placer

DEADLINE = 10.0
PAGES = 4096
GRANULE = HUGE // PAGE_SIZE


class Ground:
    """A placer, what its VMM is delivered, and whether somebody was told to ask again."""

    def __init__(self, layout: Layout, installer: ScriptedInstaller) -> None:
        self.pager = Pager(layout, PagerOptions(fault_around=0, demand_window=1024), 0.0)
        self.delivered: list[Delivery] = []
        self.told = asyncio.Event()
        clock = itertools.count(1.0)
        self.placer = Placer(
            self.pager,
            installer,
            ArrivalMap(layout.page_count),
            lambda: None,
            lambda _ended: None,
            lambda: float(next(clock)),
        )
        self.placer.desk.connect(self.delivered.append)

    def asked(self) -> list[int]:
        """Take every demand request that is due; return its pages."""
        pages: list[int] = []
        while (runs := self.pager.next_fetch(1000.0)) is not None:
            pages += [page for first, count in runs for page in range(first, first + count)]
        return pages

    def connect(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.placer.damage.watch(self.told.set))


@pytest.fixture
def installer() -> ScriptedInstaller:
    return ScriptedInstaller()


@pytest.fixture
def ground(installer: ScriptedInstaller) -> Ground:
    return Ground(Layout([Region(0, PAGES * PAGE_SIZE)]), installer)


@pytest.fixture
def huge(installer: ScriptedInstaller) -> Ground:
    return Ground(Layout([Region(0, 2 * HUGE, HUGE), Region(1 << 32, PAGE_SIZE)]), installer)


def batch(*runs: Run, damaged: tuple[int, ...] = ()) -> Batch:
    """A message in which a bit of some pages was flipped behind their checksums."""
    data = [content(page) for run in runs if run.kind in WITH_BYTES for page in range(run.first, run.first + run.pages)]
    raw = [page for run in runs if run.kind in WITH_BYTES for page in range(run.first, run.first + run.pages)]
    column = checksums_of(data)
    for page in damaged:
        changed = bytearray(content(page))
        changed[page % PAGE_SIZE] ^= 1 << page % 8
        data[raw.index(page)] = bytes(changed)
    return decode(encode(runs, data, checksums=column), checksums=True)


async def broken(connection: asyncio.Task[None]) -> FerryError:
    with pytest.raises(FerryError) as raised:
        await asyncio.wait_for(connection, DEADLINE)
    assert raised.value.reason is Reason.PAGES_DAMAGED
    return raised.value


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("first", [0, 5])
def test_only_the_damaged_pages_of_a_message_are_left_out(
    ground: Ground, installer: ScriptedInstaller, lane: Lane, first: int
) -> None:
    runs = (Run(first, 4, RAW), Run(first + 4, 2, ZERO), Run(first + 6, 3, RAW))
    hit = (first, first + 2, first + 8)
    ground.placer.place(batch(*runs, damaged=hit), lane)

    whole = {page: content(page) for page in range(first, first + 9)} | {first + 4: ZEROES, first + 5: ZEROES}
    assert installer.pages == {page: body for page, body in whole.items() if page not in hit}
    assert ground.placer.checksum_mismatches == 3
    assert all(ground.pager.state(page) is PageState.MISSING for page in hit)

    ground.placer.place(batch(*runs), lane)
    assert installer.pages == whole
    assert ground.placer.checksum_mismatches == 3


def test_a_single_damaged_page_that_is_waited_for_is_asked_for_again(
    ground: Ground, installer: ScriptedInstaller
) -> None:
    ground.pager.fault(7, 1.0)
    assert ground.asked() == [7]
    ground.pager.demand_arrived([Run(7, 1, RAW)], 2.0)
    ground.placer.place(batch(Run(7, 1, RAW), damaged=(7,)), Lane.DEMAND)
    assert installer.pages == {}
    assert ground.pager.faults_waiting == 1
    assert ground.asked() == [7]
    ground.placer.place(batch(Run(7, 1, RAW)), Lane.DEMAND)
    assert installer.pages == {7: content(7)}
    assert ground.pager.faults_waiting == 0


def test_a_damaged_page_that_nobody_waits_for_comes_with_the_rest(ground: Ground) -> None:
    request = ground.pager.next_push(1.0)
    assert request is not None
    ((first, pages),) = request.runs
    hit = first + 3
    ground.pager.push_arrived([Run(first, pages, RAW)], 2.0, last=True)
    ground.placer.place(batch(Run(first, pages, RAW), damaged=(hit,)), Lane.PUSH)
    assert ground.asked() == []
    pushed: list[int] = []
    while (request := ground.pager.next_push(3.0)) is not None:
        pushed += [page for start, count in request.runs for page in range(start, start + count)]
        ground.pager.push_arrived([Run(*run, ZERO) for run in request.runs], 3.0, last=True)
        for run in request.runs:
            ground.pager.installed(Run(*run, ZERO), Lane.PUSH, 3.0)
    assert sorted(pushed) == sorted(set(range(PAGES)) - set(range(first, first + pages)) | {hit})


def test_a_page_that_is_damaged_in_the_second_slice_is_found(ground: Ground, installer: ScriptedInstaller) -> None:
    hit = SLICE_PAGES + 1
    ground.placer.place(
        batch(Run(0, 4, RAW), Run(10, 3, ZERO), Run(20, 2 * SLICE_PAGES, RAW), damaged=(hit,)), Lane.PUSH
    )
    assert hit not in installer.pages
    assert len(installer.pages) == 4 + 3 + 2 * SLICE_PAGES - 1
    assert all(body in (content(page), ZEROES) for page, body in installer.pages.items())


def test_what_came_twice_is_not_looked_at_again(ground: Ground, installer: ScriptedInstaller) -> None:
    ground.placer.place(batch(Run(0, 8, RAW)), Lane.PUSH)
    ground.placer.place(batch(Run(0, 8, RAW), damaged=(3,)), Lane.PUSH)
    assert ground.placer.checksum_mismatches == 0
    assert ground.pager.map.missing == PAGES - 8
    assert installer.pages[3] == content(3)


def test_a_page_that_the_kernel_cannot_take_now_is_looked_at_again_when_it_can(
    ground: Ground, installer: ScriptedInstaller
) -> None:
    installer.script.extend([(5, Placed.RETRY), (5, Placed.RETRY)])
    ground.placer.place(batch(Run(2, 8, RAW), damaged=(4, 7)), Lane.PUSH)
    while ground.placer.behind:
        ground.placer.retry()
    assert installer.pages == {page: content(page) for page in (2, 3, 5, 6, 8, 9)}
    assert ground.placer.checksum_mismatches == 2


def test_damaged_private_pages_are_not_delivered(ground: Ground) -> None:
    ground.placer.place(batch(Run(2, 3, PRIVATE), damaged=(3,)), Lane.PUSH)
    assert [(one.pages, one.payload) for one in ground.delivered] == [((2,), content(2)), ((4,), content(4))]
    assert ground.placer.checksum_mismatches == 1
    ground.placer.place(batch(Run(3, 1, PRIVATE)), Lane.PUSH)
    assert ground.delivered[-1].payload == content(3)


def test_a_huge_page_with_one_damaged_page_waits_for_that_alone(huge: Ground, installer: ScriptedInstaller) -> None:
    huge.placer.place(
        batch(Run(0, 100, RAW), Run(100, 20, ZERO), Run(120, GRANULE - 120, RAW), damaged=(300,)), Lane.PUSH
    )
    assert installer.pages == {}
    assert huge.placer.checksum_mismatches == 1
    assert huge.asked() == [300]

    huge.placer.place(batch(Run(300, 1, RAW)), Lane.DEMAND)
    assert installer.pages == {page: ZEROES if 100 <= page < 120 else content(page) for page in range(GRANULE)}
    assert installer.calls == [("raw", 0, GRANULE)]
    assert huge.placer.checksum_mismatches == 1


def test_a_huge_page_is_looked_at_for_as_long_as_the_kernel_cannot_take_it(
    huge: Ground, installer: ScriptedInstaller
) -> None:
    installer.script.extend([(0, Placed.RETRY), (0, Placed.RETRY)])
    huge.placer.place(batch(Run(0, GRANULE, RAW)), Lane.PUSH)
    assert huge.placer.behind
    # What waits here is damaged by this host's memory.
    staged = huge.placer._staging._granules[0].data
    assert staged is not None
    staged[9 * PAGE_SIZE] ^= 4
    huge.placer.retry()
    assert installer.pages == {}
    assert not huge.placer.behind
    assert huge.asked() == [9]
    huge.placer.place(batch(Run(9, 1, RAW)), Lane.DEMAND)
    assert b"".join(installer.pages[page] for page in range(GRANULE)) == contents(0, GRANULE)


def test_a_huge_page_tried_twice_is_not_installed_without_its_damaged_page(
    huge: Ground, installer: ScriptedInstaller
) -> None:
    installer.script.extend([(0, Placed.RETRY), (0, Placed.RETRY)])
    # Whole, it comes once more: both wait for the kernel.
    huge.placer.retry = lambda: False  # type: ignore[method-assign]
    huge.placer.place(batch(Run(0, GRANULE, RAW)), Lane.PUSH)
    huge.placer.place(batch(Run(4, 2, RAW)), Lane.DEMAND)
    del huge.placer.retry  # type: ignore[method-assign]
    staged = huge.placer._staging._granules[0].data
    assert staged is not None
    staged[0] ^= 1
    while huge.placer.behind:
        huge.placer.retry()
    assert installer.pages == {}
    assert huge.asked() == [0]


def test_a_damaged_page_of_a_huge_one_may_turn_out_poisoned_or_be_given_away(
    huge: Ground, installer: ScriptedInstaller
) -> None:
    huge.placer.place(batch(Run(0, GRANULE, RAW), damaged=(8,)), Lane.PUSH)
    huge.placer.place(batch(Run(8, 1, POISONED)), Lane.DEMAND)
    assert installer.calls == [("poison", 0, GRANULE)]

    huge.placer.place(batch(Run(GRANULE, GRANULE, RAW), damaged=(GRANULE + 8,)), Lane.PUSH)
    huge.pager.discard(GRANULE + 8, 1, 1.0)
    huge.placer.partly_dropped(GRANULE + 8, 1)
    assert installer.pages[GRANULE + 8] == ZEROES
    assert installer.pages[GRANULE + 9] == content(GRANULE + 9)


async def test_somebody_is_told_to_ask_again_after_damage(ground: Ground) -> None:
    connection = ground.connect()
    await asyncio.sleep(0)
    assert not ground.told.is_set()
    ground.placer.place(batch(Run(0, 4, RAW), damaged=(1,)), Lane.PUSH)
    await asyncio.wait_for(ground.told.wait(), DEADLINE)
    assert not connection.done()
    connection.cancel()


async def test_many_damaged_pages_in_a_row_end_the_connection(ground: Ground, installer: ScriptedInstaller) -> None:
    connection = ground.connect()
    hit = tuple(range(2, 2 + MOST_IN_A_ROW))
    ground.placer.place(batch(Run(0, 64, RAW), damaged=hit), Lane.PUSH)
    assert f"page {hit[-1]}" in (await broken(connection)).message
    assert sorted(installer.pages) == [page for page in range(64) if page not in hit]

    # A row begins anew with the next connection.
    again = ground.connect()
    ground.placer.place(batch(Run(2, MOST_IN_A_ROW, RAW), damaged=hit[1:]), Lane.PUSH)
    await asyncio.wait_for(ground.told.wait(), DEADLINE)
    assert not again.done()
    again.cancel()


async def test_good_pages_between_damaged_ones_keep_the_connection(ground: Ground) -> None:
    connection = ground.connect()
    for first in range(0, 200, 10):
        ground.placer.place(batch(Run(first, 10, RAW), damaged=tuple(range(first, first + 7))), Lane.PUSH)
        await asyncio.wait_for(ground.told.wait(), DEADLINE)
    assert ground.placer.checksum_mismatches == 140
    assert not connection.done()
    connection.cancel()


async def test_the_same_page_damaged_again_and_again_ends_the_connection(ground: Ground) -> None:
    connection = ground.connect()
    for number in range(MOST_IN_A_ROW):
        assert not connection.done()
        ground.placer.place(batch(Run(3, 1, RAW), damaged=(3,)), Lane.DEMAND)
        ground.placer.place(batch(Run(100 + number, 1, RAW)), Lane.DEMAND)
    assert "page 3 came damaged 8 times" in (await broken(connection)).message
    assert ground.placer.checksum_mismatches == MOST_IN_A_ROW


async def test_what_has_come_whole_since_does_not_count(ground: Ground) -> None:
    connection = ground.connect()
    for first in range(0, 2 * MOST_AT_ONCE, 2):
        ground.placer.place(batch(Run(first, 2, RAW), damaged=(first,)), Lane.PUSH)
        if first % 8:
            ground.placer.place(batch(Run(first, 1, RAW)), Lane.PUSH)
    await asyncio.wait_for(ground.told.wait(), DEADLINE)
    assert not connection.done()
    connection.cancel()


async def test_many_pages_that_stay_damaged_end_the_connection(ground: Ground) -> None:
    connection = ground.connect()
    for first in range(0, 2 * MOST_AT_ONCE, 2):
        assert not connection.done()
        ground.placer.place(batch(Run(first, 2, RAW), damaged=(first,)), Lane.PUSH)
    await broken(connection)


def test_without_checksums_nothing_is_looked_at(ground: Ground, installer: ScriptedInstaller) -> None:
    ground.placer.place(decode(encode([Run(0, 2, RAW)], [contents(5, 2)])), Lane.PUSH)
    assert installer.pages == {0: content(5), 1: content(6)}
    assert ground.placer.checksum_mismatches == 0
