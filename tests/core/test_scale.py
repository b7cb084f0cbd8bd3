"""What the pager's books cost: memory by guest size, in a guest that is full, half here, or mostly holes."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Answer, Lane, Pager, PagerOptions
from pageferryd.core.runs import RAW, ZERO, Run

GIB = 1 << 30
TIB = 1 << 40
GIB_PAGES = GIB // PAGE_SIZE
MOST_PER_GIB = 64 << 10


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    tracemalloc.start()

    def now() -> int:
        # A full collection also empties the interpreter's lists of freed tuples, which are nobody's books.
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    yield now
    tracemalloc.stop()


def pager_of(size: int, options: PagerOptions | None = None) -> Pager:
    return Pager(Layout([Region(0, size)]), options or PagerOptions(), 0.0)


def push_once(pager: Pager, kind: int) -> bool:
    """Let push bring what one request may; return whether there was one."""
    request = pager.next_push(0.0)
    if request is None:
        return False
    left = request.credit // PAGE_SIZE if kind == RAW else TIB
    runs = []
    for first, pages in request.runs:
        take = min(left, pages)
        left -= take
        if take:
            runs.append(Run(first, take, kind))
    pager.push_arrived(runs, 0.0, last=True)
    for run in runs:
        for first, pages in pager.wanted(run):
            pager.installed(Run(first, pages, kind), Lane.PUSH, 0.0)
    return True


def fetch(pager: Pager, page: int) -> None:
    """Serve one fault by the demand lane."""
    if pager.fault(page, 0.0) is not Answer.FETCH:
        return
    while (runs := pager.next_fetch(0.0)) is not None:
        answer = [Run(first, pages, RAW) for first, pages in runs]
        pager.demand_arrived(answer, 0.0)
        for run in answer:
            for first, pages in pager.wanted(run):
                pager.installed(Run(first, pages, RAW), Lane.DEMAND, 0.0)


def test_a_gibibyte_that_comes_by_push_and_by_random_faults_stays_within_its_bound(traced: Callable[[], int]) -> None:
    before = traced()
    pacing = PacingOptions(max_window=4 << 20, max_credit=1 << 20)
    pager = pager_of(GIB, PagerOptions(pacing=pacing))
    rng = random.Random(1)
    most = requests = 0
    while push_once(pager, RAW):
        requests += 1
        if requests % 4 == 0:
            fetch(pager, rng.randrange(GIB_PAGES))
        if requests % 100 == 0:
            most = max(most, traced() - before)
    assert pager.complete
    assert most <= MOST_PER_GIB
    assert traced() - before <= MOST_PER_GIB // 2


def test_a_gibibyte_of_which_every_other_page_is_here_stays_within_its_bound(traced: Callable[[], int]) -> None:
    before = traced()
    pager = pager_of(GIB)
    for page in range(0, GIB_PAGES, 2):
        pager.installed(Run(page, 1, RAW), Lane.PUSH, 0.0)
    assert pager.map.missing == GIB_PAGES // 2
    assert traced() - before <= MOST_PER_GIB


def test_a_sparse_tebibyte_costs_what_was_touched_of_it(traced: Callable[[], int]) -> None:
    before = traced()
    pager = pager_of(TIB)
    rng = random.Random(2)
    for _ in range(50):
        fetch(pager, rng.randrange(TIB // PAGE_SIZE))
    assert traced() - before <= 50 * 8192 + MOST_PER_GIB


def test_a_tebibyte_of_holes_comes_in_few_requests_and_little_memory(traced: Callable[[], int]) -> None:
    before = traced()
    pager = pager_of(TIB)
    requests = 0
    while push_once(pager, ZERO):
        requests += 1
    assert pager.complete
    assert requests < 2 * TIB // GIB
    assert traced() - before <= MOST_PER_GIB


def test_giving_away_a_tebibyte_at_once_costs_next_to_nothing(traced: Callable[[], int]) -> None:
    pager = pager_of(TIB)
    before = traced()
    pager.discard(0, TIB // PAGE_SIZE, 0.0)
    assert pager.complete
    assert traced() - before <= 4096
