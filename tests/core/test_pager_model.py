"""The pager against a simple model: any order of faults, answers, discards, losses and late installs."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Answer, Lane, Pager, PagerOptions
from pageferryd.core.push_order import PushRequest
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

KINDS = st.sampled_from([RAW, RAW, ZERO, POISONED])


class AgainstAModel(RuleBasedStateMachine):
    @initialize(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), window=st.integers(1, 4))
    def make(self, sizes: list[int], window: int) -> None:
        regions = [Region(at << 30, pages * PAGE_SIZE) for at, pages in enumerate(sizes)]
        self.layout = Layout(regions)
        self.count = self.layout.page_count
        pacing = PacingOptions(max_window=window * 16 * PAGE_SIZE, max_credit=8 * PAGE_SIZE)
        options = PagerOptions(demand_window=window, demand_batch=2, push_requests=window, pacing=pacing)
        self.now = 1.0
        self.pager = Pager(self.layout, options, self.now)
        self.state: dict[int, PageState] = {}
        self.waiting: dict[int, int] = {}
        self.fetches: deque[tuple[tuple[int, int], ...]] = deque()
        self.pushes: deque[PushRequest] = deque()
        self.arrived: list[tuple[Run, Lane]] = []

    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(0, self.count - 1))
        expected = {
            PageState.PRESENT: Answer.WAKE,
            PageState.DISCARDED: Answer.ZERO,
            PageState.POISONED: Answer.POISON,
            None: Answer.JOINED if page in self.waiting else Answer.FETCH,
        }[self.state.get(page)]
        assert self.pager.fault(page, self.now, self.now - 0.001) is expected
        if expected in (Answer.FETCH, Answer.JOINED):
            self.waiting[page] = self.waiting.get(page, 0) + 1

    @rule(data=st.data(), pages=st.integers(1, 10))
    def discard(self, data: st.DataObject, pages: int) -> None:
        first = data.draw(st.integers(0, self.count - 1))
        pages = min(pages, self.count - first)
        self.end(self.pager.discard(first, pages, self.now), first, pages)
        self.state.update(dict.fromkeys(range(first, first + pages), PageState.DISCARDED))

    @rule()
    def ask_on_demand(self) -> None:
        runs = self.pager.next_fetch(self.now)
        if runs is not None:
            self.fetches.append(runs)

    @rule()
    def ask_on_push(self) -> None:
        request = self.pager.next_push(self.now)
        if request is not None:
            self.pushes.append(request)

    @precondition(lambda self: self.fetches)
    @rule(kind=KINDS)
    def answer_on_demand(self, kind: int) -> None:
        runs = [Run(first, pages, kind) for first, pages in self.fetches.popleft()]
        self.pager.demand_arrived(runs, self.now)
        self.arrived += [(run, Lane.DEMAND) for run in runs]

    @precondition(lambda self: self.pushes)
    @rule(kind=KINDS, credit=st.integers(1, 8))
    def answer_on_push(self, kind: int, credit: int) -> None:
        """The source answers with one kind; of raw pages as many as it likes within the credit."""
        request = self.pushes.popleft()
        left = min(credit, request.credit // PAGE_SIZE) if kind == RAW else self.count
        runs = []
        for first, pages in request.runs:
            take = min(left, pages)
            left -= take
            if take:
                runs.append(Run(first, take, kind))
        self.pager.push_arrived(runs[:1], self.now, last=False)
        self.pager.push_arrived(runs[1:], self.now, last=True)
        self.arrived += [(run, Lane.PUSH) for run in runs]

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def install(self, data: st.DataObject) -> None:
        """What arrived is installed in any order: the kernel may have refused some of it for a while."""
        run, lane = self.arrived.pop(data.draw(st.integers(0, len(self.arrived) - 1)))
        wanted = self.pager.wanted(run)
        pages = [page for first, count in wanted for page in range(first, first + count)]
        assert pages == [page for page in range(run.first, run.first + run.pages) if page not in self.state]
        for first, count in wanted:
            piece = Run(first, count, run.kind)
            if run.kind == POISONED:
                self.end(self.pager.poisoned(piece, self.now), first, count)
            else:
                self.end(self.pager.installed(piece, lane, self.now), first, count)
            new = PageState.POISONED if run.kind == POISONED else PageState.PRESENT
            self.state.update(dict.fromkeys(range(first, first + count), new))

    def end(self, ended: list, first: int, pages: int) -> None:
        run = range(first, first + pages)
        assert {times.page: times.faults for times in ended} == {p: n for p, n in self.waiting.items() if p in run}
        for times in ended:
            del self.waiting[times.page]

    @rule(lane=st.sampled_from(Lane))
    def lose(self, lane: Lane) -> None:
        self.pager.lane_lost(lane)
        (self.fetches if lane is Lane.DEMAND else self.pushes).clear()

    @rule(seconds=st.sampled_from([0.0001, 0.002, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        lane = self.pager.silent_lane(self.now)
        assert lane is None or (self.fetches if lane is Lane.DEMAND else self.pushes)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pager"):
            return
        assert self.pager.faults_waiting == len(self.waiting)
        assert self.pager.map.missing == self.count - len(self.state)
        assert self.pager.complete == (len(self.state) == self.count)
        for page in range(self.count):
            state = self.pager.state(page)
            if page in self.state:
                assert state is self.state[page]
            else:
                assert state in (PageState.MISSING, PageState.REQUESTED)

    def teardown(self) -> None:
        """From any state the migration can be brought to its end."""
        if not hasattr(self, "pager"):
            return
        self.arrived.clear()
        for lane in Lane:
            self.lose(lane)
        for _ in range(20 * self.count + 100):
            if self.pager.complete:
                break
            self.now += 1.0
            self.ask_on_demand()
            self.ask_on_push()
            while self.fetches:
                self.install_all([Run(*run, RAW) for run in self.fetches.popleft()], Lane.DEMAND)
            while self.pushes:
                request = self.pushes.popleft()
                runs = [Run(*run, ZERO) for run in request.runs]
                self.pager.push_arrived(runs, self.now, last=True)
                self.install_all(runs, Lane.PUSH, arrived=True)
        assert self.pager.complete
        assert self.pager.faults_waiting == 0

    def install_all(self, runs: list[Run], lane: Lane, *, arrived: bool = False) -> None:
        if not arrived:
            self.pager.demand_arrived(runs, self.now)
        for run in runs:
            for first, count in self.pager.wanted(run):
                self.pager.installed(Run(first, count, run.kind), lane, self.now)


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
