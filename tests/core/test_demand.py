"""The demand queue, against a model of what waits and what is under way."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pageferryd.core.demand import DemandQueue
from pageferryd.core.errors import UnrequestedPagesError
from pageferryd.core.runs import RAW, Run

PAGES = st.integers(0, 30)


class AgainstAModel(RuleBasedStateMachine):
    @initialize(window=st.integers(1, 4), batch=st.integers(1, 4))
    def make(self, window: int, batch: int) -> None:
        self.queue = DemandQueue(window, batch)
        self.window, self.batch = window, batch
        self.now = 1.0
        self.faults: dict[int, int] = {}
        self.unsent: list[int] = []
        self.under_way: set[int] = set()
        self.requests: deque[tuple[tuple[int, int], ...]] = deque()

    @rule(page=PAGES)
    def fault(self, page: int) -> None:
        self.now += 1
        assert self.queue.add(page, self.now - 0.5, self.now) == (page not in self.faults)
        if page not in self.faults and page not in self.under_way:
            self.unsent.append(page)
        self.faults[page] = self.faults.get(page, 0) + 1

    @precondition(lambda self: self.queue.has_room)
    @rule()
    def ask(self) -> None:
        self.now += 1
        pages = self.queue.take(self.now)
        assert pages == self.unsent[: self.batch]
        del self.unsent[: self.batch]
        if pages:
            self.send(tuple((page, 1) for page in pages), urgent=True)

    @precondition(lambda self: self.queue.has_room_for_more and not self.unsent)
    @rule(first=PAGES, pages=st.integers(1, 6))
    def ask_for_neighbours(self, first: int, pages: int) -> None:
        runs = tuple(self.queue.free(first, pages))
        free = [page for start, length in runs for page in range(start, start + length)]
        assert free == [page for page in range(first, first + pages) if page not in self.under_way]
        if runs:
            self.send(runs, urgent=False)

    def send(self, runs: tuple[tuple[int, int], ...], *, urgent: bool) -> None:
        self.queue.sent(runs, self.now, urgent=urgent)
        self.requests.append(runs)
        self.under_way.update(page for first, pages in runs for page in range(first, first + pages))

    @precondition(lambda self: self.requests)
    @rule(split=st.booleans())
    def answer(self, split: bool) -> None:
        self.now += 1
        answer = [Run(first, pages, RAW) for first, pages in self.requests.popleft()]
        if split:
            answer = [Run(run.first + at, 1, RAW) for run in answer for at in range(run.pages)]
        self.queue.answered(answer, self.now)

    @rule(first=PAGES, pages=st.sampled_from([1, 2, 5, 1000]))
    def settle(self, first: int, pages: int) -> None:
        self.now += 1
        run = range(first, first + pages)
        ended = self.queue.settled(first, pages, self.now)
        assert {times.page: times.faults for times in ended} == {p: n for p, n in self.faults.items() if p in run}
        for times in ended:
            stages = (times.read, times.queued, times.fetched, times.installed)
            assert min(stages) >= 0
            assert sum(stages) == pytest.approx(times.total)
            del self.faults[times.page]
        self.unsent = [page for page in self.unsent if page not in run]
        self.under_way.difference_update(run)

    @rule()
    def lose(self) -> None:
        self.queue.lost()
        self.requests.clear()
        self.under_way.clear()
        self.unsent = list(self.faults)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.waiting == len(self.faults)
        assert sorted(self.queue.pages_waiting()) == sorted(self.faults)
        assert self.queue.under_way == len(self.requests) <= self.window
        assert self.queue.has_room == (len(self.requests) < self.window)
        assert (self.queue.owed_since is None) == (not self.requests)
        assert all(self.queue.is_under_way(page) == (page in self.under_way) for page in range(31))
        assert all(self.queue.waits_for(page) == (page in self.faults) for page in range(31))


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([], id="nothing"),
        pytest.param([Run(5, 2, RAW)], id="less than asked"),
        pytest.param([Run(5, 4, RAW)], id="a run that is too long"),
        pytest.param([Run(6, 2, RAW)], id="a later page"),
        pytest.param([Run(5, 3, RAW), Run(9, 1, RAW), Run(10, 1, RAW)], id="a page more"),
        pytest.param([Run(9, 1, RAW), Run(5, 3, RAW)], id="another order"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_refused(answer: list[Run]) -> None:
    queue = DemandQueue(1, 1)
    queue.sent(((5, 3), (9, 1)), 1.0, urgent=True)
    with pytest.raises(UnrequestedPagesError) as raised:
        queue.answered(answer, 2.0)
    assert raised.value.reason == "UNREQUESTED_PAGES"


def test_an_answer_to_nothing_is_refused() -> None:
    with pytest.raises(UnrequestedPagesError):
        DemandQueue(1, 1).answered([Run(0, 1, RAW)], 1.0)


def test_a_lane_that_answers_slowly_owes_only_since_its_last_answer() -> None:
    queue = DemandQueue(2, 1)
    queue.sent(((1, 1),), 1.0, urgent=True)
    queue.sent(((2, 1),), 1.0, urgent=True)
    assert queue.owed_since == 1.0
    queue.answered([Run(1, 1, RAW)], 9.0)
    assert queue.owed_since == 9.0


def test_faults_that_push_answers_leave_nothing_behind_while_nothing_can_be_asked() -> None:
    queue = DemandQueue(1, 1)
    for page in range(10_000):
        queue.add(page, 1.0, 1.0)
        queue.settled(page, 1, 2.0)
    assert len(queue._unsent) < 100


def test_half_the_window_is_kept_for_faults() -> None:
    queue = DemandQueue(4, 1)
    for page in range(2):
        assert queue.has_room_for_more
        queue.sent(((page, 1),), 1.0, urgent=False)
    assert not queue.has_room_for_more
    assert queue.has_room
