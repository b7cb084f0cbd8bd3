"""Huge pages that are partly private to the guest: their shared side is installed whole, with zeroes in the gaps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from guarded import DEADLINE, HUGE, Guarded, content, contents
from scripted_installer import POISON, ZEROES, ScriptedInstaller

from pageferry.vmm.memory import Backing
from pageferryd.core.demand import FaultTimes
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.core.runs import OPAQUE, POISONED, PRIVATE, PRIVATE_ZERO, RAW, WITH_BYTES, ZERO, Run, decode, encode
from pageferryd.destination.arrivals import ArrivalMap
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.destination.imports import Delivery, ImportEnd
from pageferryd.destination.installer import Installer, Placed
from pageferryd.destination.intake import FaultIntake
from pageferryd.destination.placer import Placer
from pageferryd.destination.uffd_installer import UffdInstaller
from pageferryd.linux.userfaultfd import Fault

GRANULE = HUGE // PAGE_SIZE


class Way:
    """One huge page and a small one between doors and an installer; time goes on with every look."""

    def __init__(self, installer: Installer, layout: Layout) -> None:
        self.pager = Pager(layout, PagerOptions(fault_around=0, demand_window=64), 0.0)
        self.ended: list[FaultTimes] = []
        self.told: list[tuple[int, int, Settled]] = []
        self.delivered: list[Delivery] = []
        clock = itertools.count(10.0)
        self.placer = Placer(
            self.pager,
            installer,
            ArrivalMap(layout.page_count),
            lambda: None,
            self._end,
            lambda: float(next(clock)),
            lambda first, pages, how: self.told.append((first, pages, how)),
        )
        self.placer.desk.connect(self.delivered.append)
        self.intake = FaultIntake(self.pager, self.placer, self._end, lambda: None, lambda: float(next(clock)))

    def _end(self, ended: list[FaultTimes]) -> None:
        self.ended += ended
        for times in ended:
            self.placer.touched_shared.discard(times.page)

    def touch(self, page: int) -> None:
        """An access through the userfaultfd, which names the first page of a huge one."""
        self.intake.take("uffd", DoorEvents((), [self.pager.layout.granule(page)[0]], 9.0))

    def exit(self, page: int) -> None:
        self.intake.take("exit", DoorEvents((), [page], 9.0))

    def arrive(self, *runs: Run, lane: Lane = Lane.PUSH) -> None:
        data = [contents(run.first, run.pages) for run in runs if run.kind in WITH_BYTES]
        self.placer.place(decode(encode(runs, data)), lane)

    def report(self, page: int, end: ImportEnd = ImportEnd.DONE) -> None:
        self.placer.desk.report(page, 1, end)

    def convert(self, first: int, pages: int) -> None:
        self.intake.discard(first, pages, 50.0)

    def fetched(self) -> set[int]:
        """Take all requests that are due; return their pages."""
        pages: set[int] = set()
        while (runs := self.pager.next_fetch(60.0)) is not None:
            pages.update(page for first, count in runs for page in range(first, first + count))
        return pages


@pytest.fixture
def installer() -> ScriptedInstaller:
    return ScriptedInstaller()


@pytest.fixture
def way(installer: ScriptedInstaller) -> Way:
    return Way(installer, Layout([Region(0, HUGE, HUGE), Region(1 << 32, PAGE_SIZE)]))


def mixed(private: set[int]) -> dict[int, bytes]:
    return {page: ZEROES if page in private else content(page) for page in range(GRANULE)}


@pytest.mark.parametrize("kind", [PRIVATE, PRIVATE_ZERO, OPAQUE])
def test_the_shared_side_is_installed_whole_before_any_import(
    way: Way, installer: ScriptedInstaller, kind: int
) -> None:
    way.arrive(Run(0, 300, RAW), Run(300, 100, kind))
    assert installer.pages == {}
    way.arrive(Run(400, 112, RAW))

    assert installer.calls == [("raw", 0, GRANULE)]
    assert installer.pages == mixed(set(range(300, 400)))
    assert {way.pager.state(page) for page in (0, 299, 400, 511)} == {PageState.PRESENT}
    assert way.pager.map.missing == 100 + 1
    assert not way.placer.behind


def test_private_pages_that_come_last_complete_the_granule_and_are_settled_by_their_import(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.arrive(Run(1, GRANULE - 1, RAW))
    way.exit(0)
    way.arrive(Run(0, 1, PRIVATE))
    assert installer.pages == mixed({0})
    assert [one.pages for one in way.delivered] == [(0,)]
    assert (0, 1, Settled.INSTALLED) not in way.told

    way.report(0)
    assert (0, 1, Settled.INSTALLED) in way.told
    assert way.pager.map.missing == 1
    assert installer.calls == [("raw", 0, GRANULE)]


def test_who_touches_it_waits_for_its_shared_pages_though_its_first_is_private(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.arrive(Run(0, 2, PRIVATE))
    way.touch(100)
    assert installer.calls == []
    assert way.intake.counts == {("uffd", "missing"): 1}
    assert way.fetched() >= set(range(2, GRANULE))

    way.arrive(Run(2, GRANULE - 2, RAW))
    assert installer.pages == mixed({0, 1})
    assert [times.page for times in way.ended] == [2]
    assert way.placer.shared_accesses == 0


def test_who_touched_it_before_its_first_page_turned_out_private_waits_on_even_when_the_lanes_are_lost(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.touch(0)
    way.fetched()
    way.arrive(Run(0, 2, PRIVATE))
    way.report(0)
    way.report(1)
    way.pager.lane_lost(Lane.DEMAND)
    # Not by what waits for an import: those are done.
    assert way.fetched() == set(range(2, GRANULE))
    assert installer.calls == []


def test_a_granule_that_is_all_private_is_no_ones_to_install_until_it_is_touched(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.touch(7)
    way.arrive(Run(0, GRANULE - 1, PRIVATE_ZERO))
    assert installer.calls == []
    way.arrive(Run(GRANULE - 1, 1, PRIVATE))
    assert installer.pages == dict.fromkeys(range(GRANULE), ZEROES)
    assert way.placer.shared_accesses == 1

    way.touch(7)
    assert installer.woken == [(0, GRANULE)]
    # Nobody's wait for the private side has ended with that.
    assert way.told == []


def test_what_the_kernel_cannot_take_now_is_tried_again_as_it_is_then(way: Way, installer: ScriptedInstaller) -> None:
    installer.script.extend([(0, Placed.RETRY), (0, Placed.RETRY)])
    way.arrive(Run(0, 1, PRIVATE), Run(1, GRANULE - 1, RAW))
    assert way.placer.behind
    way.convert(5, 2)
    assert way.placer.retry()
    assert installer.pages == mixed({0, 5, 6})
    assert way.pager.state(5) is PageState.DISCARDED


def test_a_granule_that_is_there_already_is_woken_and_its_private_pages_stay_missing(
    way: Way, installer: ScriptedInstaller
) -> None:
    installer.pages[0] = b"the guest's own"
    way.arrive(Run(0, 1, PRIVATE), Run(1, GRANULE - 1, RAW))
    assert installer.woken == [(0, GRANULE)]
    assert list(way.pager.map.missing_runs(0, GRANULE)) == [(0, 1)]


def test_a_granule_without_memory_is_given_up_but_for_its_private_pages(way: Way, installer: ScriptedInstaller) -> None:
    installer.script.append((0, Placed.UNMAPPED))
    way.arrive(Run(0, 1, PRIVATE), Run(1, GRANULE - 1, RAW))
    assert way.told == [(1, GRANULE - 1, Settled.ZERO)]
    assert list(way.pager.map.missing_runs(0, GRANULE)) == [(0, 1)]


def test_a_page_that_cannot_be_read_poisons_the_shared_side_and_no_private_page(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.arrive(Run(0, 1, PRIVATE), Run(1, 1, POISONED), Run(2, GRANULE - 2, RAW))
    assert set(installer.pages.values()) == {POISON}
    assert way.told == [(1, GRANULE - 1, Settled.POISONED)]
    way.report(0)
    assert way.told[-1] == (0, 1, Settled.INSTALLED)
    way.touch(0)
    assert way.told[-1][2] is Settled.POISONED

    # Given away as a whole it is zero.
    installer.pages.clear()
    way.convert(0, GRANULE)
    assert installer.pages == dict.fromkeys(range(GRANULE), ZEROES)


def test_a_conversion_drops_what_was_delivered_and_answers_who_waits_at_once(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.arrive(Run(3, 1, PRIVATE))
    way.exit(3)
    way.convert(3, 1)
    assert way.told == [(3, 1, Settled.ZERO)]
    assert 3 not in way.placer.desk
    assert 3 not in way.placer.private
    # What comes late is of the old kind.
    way.arrive(Run(3, 1, PRIVATE))
    assert len(way.delivered) == 1
    assert installer.calls == []

    way.arrive(Run(0, 3, RAW), Run(4, GRANULE - 4, RAW))
    assert installer.pages == mixed({3})


def test_a_conversion_of_the_last_page_that_was_to_come_completes_the_granule(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.touch(0)
    way.arrive(Run(1, GRANULE - 1, RAW))
    way.convert(0, 1)
    assert installer.pages == mixed({0})
    installer.woken.clear()
    way.touch(0)
    assert installer.woken == [(0, GRANULE)]


def test_an_exit_for_a_converted_page_is_answered_without_zeroes_over_the_others(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.convert(3, 1)
    way.exit(3)
    assert way.told == [(3, 1, Settled.ZERO)]
    assert installer.calls == []
    assert installer.let == [(3, 1)]


def test_a_granule_of_which_every_page_was_converted_is_zero(way: Way, installer: ScriptedInstaller) -> None:
    way.convert(0, 300)
    way.touch(0)
    way.convert(300, GRANULE - 300)
    assert installer.pages == dict.fromkeys(range(GRANULE), ZEROES)
    assert way.pager.map.missing == 1


def test_an_import_that_failed_is_delivered_again_and_the_granule_is_left_alone(
    way: Way, installer: ScriptedInstaller
) -> None:
    way.exit(0)
    way.fetched()
    way.arrive(Run(0, 1, PRIVATE), Run(1, GRANULE - 1, ZERO))
    assert installer.calls == [("zero", 0, GRANULE)]
    way.report(0, ImportEnd.FAILED)
    assert way.fetched() == {0}
    way.arrive(Run(0, 1, PRIVATE))
    way.report(0)
    assert len(way.delivered) == 2
    assert installer.calls == [("zero", 0, GRANULE)]


# With the kernel's own huge pages


@pytest.fixture
def real(guard: Callable[..., Guarded], huge_pages: None) -> tuple[Guarded, Way]:
    guarded = guard(2, backing=Backing.HUGETLBFS)
    return guarded, Way(UffdInstaller(guarded.uffd, guarded.addresses), guarded.layout)


def touching(guarded: Guarded, way: Way, page: int) -> Future[bytes]:
    """Read a page in a thread, and hand its userfault in."""
    future = guarded.reading(page)
    guarded.wait_queued()
    for event in guarded.uffd.read_events():
        assert isinstance(event, Fault)
        named = guarded.addresses.page_at(event.address)
        assert named == guarded.layout.granule(page)[0]
        way.touch(named)
    return future


@pytest.mark.userfaultfd
@pytest.mark.hugetlb
@pytest.mark.root
def test_in_real_huge_pages_a_reader_of_any_page_gets_its_bytes_and_of_a_private_one_zeroes(
    real: tuple[Guarded, Way],
) -> None:
    guarded, way = real
    shared, private = touching(guarded, way, 40), touching(guarded, way, GRANULE + 1)
    way.arrive(Run(0, 40, PRIVATE), Run(40, GRANULE - 40, RAW))
    assert shared.result(DEADLINE) == content(40)
    assert guarded.read(39) == bytes(PAGE_SIZE)
    way.arrive(Run(GRANULE, 2, PRIVATE), Run(GRANULE + 2, GRANULE - 2, RAW))
    assert private.result(DEADLINE) == bytes(PAGE_SIZE)
    gaps = [page < 40 or page in (GRANULE, GRANULE + 1) for page in range(2 * GRANULE)]
    expected = [bytes(PAGE_SIZE) if gap else content(page) for page, gap in enumerate(gaps)]
    assert guarded.read_all() == b"".join(expected)


@pytest.mark.userfaultfd
@pytest.mark.hugetlb
@pytest.mark.root
def test_in_a_real_huge_page_that_is_all_private_a_reader_gets_zeroes(real: tuple[Guarded, Way]) -> None:
    guarded, way = real
    reading = touching(guarded, way, 100)
    way.arrive(Run(0, GRANULE, PRIVATE_ZERO))
    assert reading.result(DEADLINE) == bytes(PAGE_SIZE)
    assert guarded.read(0) == bytes(PAGE_SIZE)
