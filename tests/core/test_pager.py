"""What the pager does at its edges: misbehaving sources, huge pages, prefetch, silence."""

from __future__ import annotations

import pytest

from pageferryd.core.errors import PageRangeError, UnrequestedPagesError
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Answer, Lane, Pager, PagerOptions
from pageferryd.core.requests import MAX_CREDIT, MAX_FETCH_PAGES
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

HUGE = 2 << 20


# Requests of 64 pages.
PACING = PacingOptions(max_credit=64 * PAGE_SIZE)


def pager_of(pages: int = 1000, **options: object) -> Pager:
    options.setdefault("pacing", PACING)
    return Pager(Layout([Region(0, pages * PAGE_SIZE)]), PagerOptions(**options), 0.0)  # type: ignore[arg-type]


def huge_pager(page_size: int, granules: int, **options: object) -> Pager:
    options.setdefault("pacing", PACING)
    layout = Layout([Region(0, granules * page_size, page_size)])
    return Pager(layout, PagerOptions(**options), 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (1000, 1), (999, 2), (0, 0)])
def test_pages_outside_the_layout_are_refused(first: int, pages: int) -> None:
    pager = pager_of(1000)
    with pytest.raises(PageRangeError):
        pager.discard(first, pages, 1.0)
    if pages == 1:
        with pytest.raises(PageRangeError):
            pager.fault(first, 1.0)
    assert pager.counts.faults == 0
    assert pager.map.missing == 1000


@pytest.mark.parametrize(
    ("runs", "last"),
    [
        pytest.param([Run(1, 1, RAW)], False, id="a page skipped"),
        pytest.param([Run(0, 1, RAW), Run(0, 1, RAW)], False, id="a page twice"),
        pytest.param([Run(0, 65, ZERO)], False, id="a page more than asked"),
        pytest.param([Run(0, 64, RAW), Run(64, 1, RAW)], False, id="a page behind the end"),
        pytest.param([], True, id="an end without a page"),
        pytest.param([Run(1 << 63, 1, RAW)], False, id="a page far away"),
    ],
)
def test_a_push_that_is_not_what_was_asked_is_refused(runs: list[Run], last: bool) -> None:
    pager = pager_of()
    request = pager.next_push(0.0)
    assert request is not None
    assert request.runs == ((0, 64),)
    with pytest.raises(UnrequestedPagesError):
        pager.push_arrived(runs, 1.0, last=last)


def test_a_push_beyond_its_credit_is_refused() -> None:
    pager = pager_of()
    for _ in range(2):
        request = pager.next_push(0.0)
        assert request is not None
        zeroes = [Run(first, pages, ZERO) for first, pages in request.runs]
        pager.push_arrived(zeroes, 0.0, last=True)
        for run in zeroes:
            pager.installed(run, Lane.PUSH, 0.0)
    request = pager.next_push(0.0)
    assert request is not None
    first, pages = request.runs[0]
    assert pages * PAGE_SIZE > request.credit
    with pytest.raises(UnrequestedPagesError, match="granted"):
        pager.push_arrived([Run(first, request.credit // PAGE_SIZE + 1, RAW)], 0.0, last=False)


def test_a_push_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(UnrequestedPagesError, match="nobody asked"):
        pager_of().push_arrived([Run(0, 1, RAW)], 1.0, last=True)


def test_an_answer_of_before_the_loss_is_refused_after_it() -> None:
    pager = pager_of()
    pager.fault(5, 0.0)
    assert pager.next_fetch(0.0) == ((5, 1),)
    assert pager.next_push(0.5)
    for lane in Lane:
        pager.lane_lost(lane)
    with pytest.raises(UnrequestedPagesError):
        pager.demand_arrived([Run(5, 1, RAW)], 1.0)
    with pytest.raises(UnrequestedPagesError):
        pager.push_arrived([Run(0, 1, RAW)], 1.0, last=False)
    assert pager.next_fetch(2.0) == ((5, 1),)


def test_neighbours_never_take_the_half_of_the_window_that_faults_need() -> None:
    pager = pager_of(100_000, demand_window=4, demand_batch=1)
    pager.fault(0, 0.0)
    pager.next_fetch(0.0)
    pager.demand_arrived([Run(0, 1, RAW)], 0.0)
    pager.installed(Run(0, 1, RAW), Lane.DEMAND, 0.0)
    for page in (1, 6, 15, 32, 65):
        pager.fault(page, 0.0)
    asked = []
    while (runs := pager.next_fetch(0.0)) is not None:
        asked.append(runs)
    # Four faults, although windows of neighbours wait as well.
    assert asked == [((1, 1),), ((6, 1),), ((15, 1),), ((32, 1),)]
    for (page, _), *_ in asked[:3]:
        pager.demand_arrived([Run(page, 1, RAW)], 0.0)
    asked = []
    while (runs := pager.next_fetch(0.0)) is not None:
        asked.append(runs)
    assert asked[0] == ((65, 1),)
    assert len(asked) == 1


def test_prefetch_is_issued_used_and_late_as_a_walk_shows() -> None:
    pager = pager_of()
    now = 0.0
    for page in (0, 1, 6):
        pager.fault(page, now)
        while (runs := pager.next_fetch(now)) is not None:
            answer = [Run(first, pages, RAW) for first, pages in runs]
            pager.demand_arrived(answer, now)
            for run in answer:
                pager.installed(run, Lane.DEMAND, now)
    counts = pager.around.counts
    assert (counts.issued, counts.used, counts.late) == (12, 4, 0)


def test_a_page_under_way_on_push_is_asked_for_again_when_the_guest_waits_for_it() -> None:
    pager = pager_of()
    assert pager.next_push(0.0) is not None
    assert pager.fault(3, 0.0) is Answer.FETCH
    assert pager.next_fetch(0.0) == ((3, 1),)


def test_pages_that_arrived_and_wait_to_be_installed_are_not_pushed_again() -> None:
    pager = pager_of(100)
    request = pager.next_push(0.0)
    assert request is not None
    pager.push_arrived([Run(first, pages, RAW) for first, pages in request.runs], 0.0, last=True)
    following = pager.next_push(0.0)
    assert following is not None
    assert following.runs == ((64, 36),)
    assert pager.next_push(0.0) is None


@pytest.mark.parametrize("page_size", [64 << 10, HUGE, 1 << 30])
def test_requests_for_huge_pages_keep_the_bounds_of_the_contract(page_size: int) -> None:
    pager = huge_pager(page_size, 2)
    pager.fault(7, 0.0)
    while (runs := pager.next_fetch(0.0)) is not None:
        assert sum(pages for _, pages in runs) <= MAX_FETCH_PAGES
    while (request := pager.next_push(1.0)) is not None:
        assert request.credit <= min(MAX_CREDIT, PACING.max_credit)
    assert pager.push_under_way <= PacingOptions().max_window


def test_a_fault_on_a_huge_page_fetches_the_touched_page_first_and_then_all_of_it() -> None:
    pager = huge_pager(HUGE, 2)
    pager.fault(700, 0.0)
    assert pager.next_fetch(0.0) == ((700, 1),)
    pager.demand_arrived([Run(700, 1, RAW)], 0.0)
    asked = {700}
    while (runs := pager.next_fetch(0.0)) is not None:
        pages = {page for first, count in runs for page in range(first, first + count)}
        assert not pages & asked
        asked |= pages
        pager.demand_arrived([Run(first, count, RAW) for first, count in runs], 0.0)
    assert asked == set(range(512, 1024))
    ended = pager.installed(Run(512, 512, RAW), Lane.DEMAND, 1.0)
    assert [times.page for times in ended] == [700]


def test_pieces_to_install_stay_in_one_region_where_backings_differ() -> None:
    layout = Layout([Region(0, 3 * PAGE_SIZE), Region(HUGE, HUGE, HUGE)])
    pager = Pager(layout, PagerOptions(pacing=PACING), 0.0)
    assert pager.wanted(Run(1, 10, ZERO)) == [(1, 2), (3, 8)]


def test_poison_never_covers_what_was_discarded_and_a_discard_heals_poison() -> None:
    pager = pager_of()
    pager.discard(1, 1, 0.0)
    pager.poisoned(Run(0, 3, POISONED), 0.0)
    assert [pager.fault(page, 1.0) for page in range(3)] == [Answer.POISON, Answer.ZERO, Answer.POISON]
    pager.discard(0, 3, 2.0)
    assert [pager.fault(page, 3.0) for page in range(3)] == [Answer.ZERO] * 3


def test_a_lane_is_silent_only_while_it_owes_something() -> None:
    pager = pager_of(silence=10.0, pacing=PacingOptions(max_credit=64 * PAGE_SIZE, max_hold=0.0))
    assert pager.silent_lane(1000.0) is None
    pager.fault(5, 1000.0)
    pager.next_fetch(1000.0)
    assert pager.next_timer(1000.0) == 1010.0
    assert pager.silent_lane(1009.9) is None
    assert pager.silent_lane(1010.0) is Lane.DEMAND
    pager.demand_arrived([Run(5, 1, RAW)], 1010.0)
    assert pager.silent_lane(5000.0) is None
    pager.installed(Run(5, 1, RAW), Lane.DEMAND, 1010.0)
    assert pager.next_push(2000.0)
    assert pager.silent_lane(2010.0) is Lane.PUSH


def test_empty_messages_do_not_pass_for_an_answer() -> None:
    pager = pager_of(silence=10.0)
    assert pager.next_push(0.0)
    pager.push_arrived([], 9.0, last=False)
    assert pager.silent_lane(10.0) is Lane.PUSH


def test_a_rate_limit_is_not_used_up_by_asking_when_nothing_is_left_to_ask() -> None:
    pager = pager_of(10, pacing=PacingOptions(bytes_per_second=10_000))
    assert pager.next_push(0.0)
    for _ in range(1000):
        assert pager.next_push(5.0) is None
    pager.lane_lost(Lane.PUSH)
    assert pager.next_push(10.0) is not None
