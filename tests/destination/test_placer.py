"""The placer between a real pager and an installer that answers whatever a kernel may."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from guarded import Guarded, content, contents
from scripted_installer import POISON, ZEROES, ScriptedInstaller

from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing
from pageferryd.core.demand import FaultTimes
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.core.runs import POISONED, RAW, ZERO, Batch, Run, decode, encode
from pageferryd.destination.arrivals import ArrivalMap
from pageferryd.destination.installer import Installer, Placed
from pageferryd.destination.placer import FINE_SLICE_PAGES, SLICE_PAGES, Placer
from pageferryd.destination.uffd_installer import UffdInstaller

PAGES = 1024
HUGE = 2 << 20


class Ground:
    """A placer, and what it tells."""

    def __init__(self, layout: Layout, installer: Installer) -> None:
        self.pager = Pager(layout, PagerOptions(), 0.0)
        self.ended: list[FaultTimes] = []
        self.drains = 0
        self.on_drain: Callable[[], None] = lambda: None
        self.arrivals = ArrivalMap(layout.page_count)
        clock = itertools.count(1.0)
        self.placer = Placer(
            self.pager, installer, self.arrivals, self._drain, self.ended.extend, lambda: float(next(clock))
        )

    def _drain(self) -> None:
        self.drains += 1
        self.on_drain()


@pytest.fixture
def installer() -> ScriptedInstaller:
    return ScriptedInstaller()


@pytest.fixture
def ground(installer: ScriptedInstaller) -> Ground:
    return Ground(Layout([Region(0, PAGES * PAGE_SIZE)]), installer)


def batch(*runs: Run) -> Batch:
    data = [contents(run.first, run.pages) for run in runs if run.kind == RAW]
    return decode(encode(runs, data))


def test_runs_of_each_kind_are_put_in_their_places(ground: Ground, installer: ScriptedInstaller) -> None:
    ground.placer.place(batch(Run(3, 2, RAW), Run(5, 1, ZERO), Run(9, 1, RAW), Run(10, 2, POISONED)), Lane.DEMAND)

    assert installer.pages == {
        3: content(3), 4: content(4), 5: ZEROES, 9: content(9), 10: POISON, 11: POISON,
    }  # fmt: skip
    assert not ground.placer.behind
    assert ground.pager.map.missing == PAGES - 6
    assert ground.pager.state(10) is PageState.POISONED
    assert ground.placer.pages == {("demand", "raw"): 3, ("demand", "zero"): 1, ("demand", "poisoned"): 2}


def test_what_has_come_before_is_not_placed_again(ground: Ground, installer: ScriptedInstaller) -> None:
    ground.placer.place(batch(Run(4, 1, RAW)), Lane.DEMAND)
    ground.pager.discard(6, 1, 1.0)
    ground.placer.place(batch(Run(2, 8, RAW)), Lane.PUSH)

    assert installer.calls == [("raw", 4, 1), ("raw", 2, 2), ("raw", 5, 1), ("raw", 7, 3)]
    assert all(installer.pages[page] == content(page) for page in (2, 3, 4, 5, 7, 8, 9))
    assert 6 not in installer.pages
    assert ground.pager.counts.duplicate_pages == 2


def test_a_long_run_is_placed_in_slices(ground: Ground, installer: ScriptedInstaller) -> None:
    slices = ground.placer.slices(batch(Run(0, 2 * SLICE_PAGES + 10, RAW)), Lane.PUSH)
    next(slices)
    assert len(installer.pages) == SLICE_PAGES
    # A page given away between two slices is not placed with the next.
    ground.pager.discard(SLICE_PAGES + 5, 1, 1.0)
    for _ in slices:
        pass
    assert len(installer.pages) == 2 * SLICE_PAGES + 9
    assert SLICE_PAGES + 5 not in installer.pages
    assert all(body == content(page) for page, body in installer.pages.items())


def test_slices_are_finer_while_faults_come_whatever_the_runs(ground: Ground, installer: ScriptedInstaller) -> None:
    now = 1.0
    ground.pager.fault(PAGES - 1, now)
    runs = [Run(first, 3, RAW) for first in range(0, 3 * FINE_SLICE_PAGES, 4)]
    placed = [0, *(len(installer.pages) for _ in ground.placer.slices(batch(*runs), Lane.PUSH))]
    assert len(placed) > 2
    assert max(after - before for before, after in itertools.pairwise(placed)) < FINE_SLICE_PAGES + 3


@pytest.mark.parametrize("how", [Placed.RETRY, Reason.NO_SPACE])
def test_what_the_kernel_cannot_take_now_is_kept_and_tried_again(
    ground: Ground, installer: ScriptedInstaller, how: Placed | Reason
) -> None:
    installer.script.extend([(3, how), (0, how), (0, how)])
    ground.placer.place(batch(Run(0, 8, RAW), Run(20, 1, ZERO)), Lane.PUSH)
    assert ground.placer.behind
    assert ground.drains == 1

    while ground.placer.behind:
        ground.placer.retry()
    assert {page: installer.pages[page] for page in range(8)} == {page: content(page) for page in range(8)}
    assert installer.pages[20] == ZEROES
    assert ground.pager.map.missing == PAGES - 9


def test_a_page_given_away_while_it_was_kept_is_dropped(ground: Ground, installer: ScriptedInstaller) -> None:
    installer.script.append((2, Placed.RETRY))
    ground.on_drain = lambda: ground.placer.dropped(3, 1) or (ground.pager.discard(3, 1, 1.0) and None)
    ground.placer.place(batch(Run(0, 6, RAW)), Lane.PUSH)

    assert not ground.placer.behind
    assert sorted(installer.pages) == [0, 1, 2, 4, 5]
    assert all(body == content(page) for page, body in installer.pages.items())


def test_a_page_that_is_there_is_woken_and_counts_as_placed(ground: Ground, installer: ScriptedInstaller) -> None:
    ground.pager.fault(5, 0.5)
    installer.pages[5] = b"the guest's own"
    ground.placer.place(batch(Run(4, 3, RAW)), Lane.DEMAND)

    assert installer.pages == {4: content(4), 5: b"the guest's own", 6: content(6)}
    assert (5, 1) in installer.woken
    assert [times.page for times in ground.ended] == [5]
    assert ground.pager.map.missing == PAGES - 3


def test_a_page_without_memory_is_settled_and_its_neighbours_are_placed(
    ground: Ground, installer: ScriptedInstaller
) -> None:
    installer.script.append((1, Placed.UNMAPPED))
    ground.placer.place(batch(Run(0, 3, RAW)), Lane.PUSH)
    assert sorted(installer.pages) == [0, 2]
    assert installer.pages[2] == content(2)
    assert ground.pager.state(1) is PageState.DISCARDED


@pytest.mark.parametrize("reason", [Reason.VMM_GONE, Reason.USERFAULTFD_REFUSED])
def test_what_no_waiting_repairs_is_raised(ground: Ground, installer: ScriptedInstaller, reason: Reason) -> None:
    installer.script.append((0, reason))
    with pytest.raises(FerryError) as raised:
        ground.placer.place(batch(Run(0, 1, RAW)), Lane.DEMAND)
    assert raised.value.reason is reason
    assert ground.pager.map.missing == PAGES


@pytest.mark.parametrize("orders", list(itertools.product([Placed.DONE, Placed.RETRY, Reason.NO_SPACE], repeat=4)))
def test_every_page_gets_in_whatever_the_order_of_refusals(orders: tuple[Placed | Reason, ...]) -> None:
    installer = ScriptedInstaller()
    ground = Ground(Layout([Region(0, 16 * PAGE_SIZE)]), installer)
    installer.pages[6] = b"there"
    installer.script.extend((2 if how is not Placed.DONE else 16, how) for how in orders)
    ground.placer.place(batch(Run(0, 9, RAW), Run(9, 7, ZERO)), Lane.PUSH)
    for _ in range(10):
        ground.placer.retry()
    assert not ground.placer.behind
    assert ground.pager.map.missing == 0
    expected = {page: content(page) if page < 9 else ZEROES for page in range(16)}
    assert installer.pages == {**expected, 6: b"there"}


def test_who_waits_for_a_page_that_was_given_away_gets_zeroes_in_the_end(
    ground: Ground, installer: ScriptedInstaller
) -> None:
    ground.pager.discard(7, 1, 1.0)
    installer.script.append((0, Placed.RETRY))
    ground.placer.serve_zero(7)
    assert ground.placer.behind
    assert ground.placer.retry()
    assert installer.pages == {7: ZEROES}
    ground.placer.serve_zero(7)
    assert installer.woken == [(7, 1)]


def test_who_touched_a_poisoned_page_is_given_the_error_or_woken(ground: Ground, installer: ScriptedInstaller) -> None:
    ground.placer.serve_poison(7)
    assert installer.pages == {7: POISON}
    ground.placer.serve_poison(7)
    assert installer.woken == [(7, 1)]


def test_a_present_page_that_the_vmm_has_dropped_reads_as_zero_from_then_on(
    ground: Ground, installer: ScriptedInstaller
) -> None:
    ground.placer.place(batch(Run(7, 1, RAW)), Lane.DEMAND)
    ground.placer.serve_present(7)
    assert installer.woken == [(7, 1)]
    assert ground.pager.state(7) is PageState.PRESENT

    del installer.pages[7]
    ground.placer.serve_present(7)
    assert installer.pages == {7: ZEROES}
    assert ground.pager.state(7) is PageState.DISCARDED


def test_pages_of_a_huge_page_wait_for_one_another() -> None:
    installer = ScriptedInstaller()
    ground = Ground(Layout([Region(0, HUGE, HUGE), Region(1 << 32, 4 * PAGE_SIZE)]), installer)
    ground.pager.fault(100, 0.5)
    ground.placer.place(batch(Run(0, 300, RAW)), Lane.PUSH)
    assert installer.pages == {}
    assert ground.pager.map.missing == 516

    ground.placer.place(batch(Run(300, 100, ZERO), Run(400, 114, RAW)), Lane.DEMAND)
    assert installer.calls == [("raw", 0, 512), ("raw", 512, 2)]
    assert all(installer.pages[page] == (ZEROES if 300 <= page < 400 else content(page)) for page in range(514))
    assert [times.page for times in ground.ended] == [100]


def test_a_huge_page_that_the_kernel_cannot_take_now_is_kept_whole() -> None:
    installer = ScriptedInstaller()
    ground = Ground(Layout([Region(0, HUGE, HUGE)]), installer)
    installer.script.extend([(0, Placed.RETRY), (0, Placed.RETRY)])
    ground.placer.place(batch(Run(0, 512, RAW)), Lane.PUSH)
    assert ground.placer.behind
    assert ground.placer.retry()
    assert installer.pages == {page: content(page) for page in range(512)}


def test_a_huge_page_given_away_is_not_put_together_from_what_was_staged() -> None:
    installer = ScriptedInstaller()
    ground = Ground(Layout([Region(0, 2 * HUGE, HUGE)]), installer)
    ground.placer.place(batch(Run(0, 511, RAW)), Lane.PUSH)
    ground.placer.dropped(0, 512)
    ground.pager.discard(0, 512, 1.0)
    ground.placer.place(batch(Run(511, 1, RAW)), Lane.PUSH)
    assert installer.pages == {}
    ground.placer.serve_zero(17)
    assert installer.calls == [("zero", 0, 512)]


@pytest.mark.userfaultfd
def test_real_memory_of_each_kind_is_filled_page_by_page(guard: Callable[..., Guarded], backing: Backing) -> None:
    guarded = guard(1, 2, backing=backing)
    size = guarded.granule
    ground = Ground(guarded.layout, UffdInstaller(guarded.uffd, guarded.addresses))
    reading = guarded.reading(2 * size)
    ground.placer.place(batch(Run(0, 1, RAW)), Lane.DEMAND)
    ground.placer.place(batch(Run(0, 2 * size, RAW), Run(2 * size, size, RAW)), Lane.PUSH)
    while ground.placer.behind:
        ground.placer.retry()

    assert reading.result(10) == content(2 * size)
    assert ground.pager.map.missing == 0
    assert guarded.read_all() == contents(0, 3 * size)
