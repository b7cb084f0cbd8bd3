"""Push order: every missing page comes once, near the guest first, in requests of bounded size."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_set import PageSet
from pageferryd.core.push_order import MAX_RUNS, MAX_STRETCH_PAGES, PushOrder, PushRequest

GRANULE = 64 << 10


def pages_of(runs: tuple[tuple[int, int], ...]) -> list[int]:
    return [page for first, pages in runs for page in range(first, first + pages)]


def order_of(pages: int, huge: int = 0) -> tuple[PushOrder, PageSet]:
    regions = [Region(0, pages * PAGE_SIZE)]
    if huge:
        regions.append(Region(1 << 40, huge * GRANULE, GRANULE))
    layout = Layout(regions)
    settled = PageSet(layout.page_count)
    return PushOrder(layout, settled), settled


class AgainstAModel(RuleBasedStateMachine):
    @initialize(pages=st.integers(1, 90), huge=st.sampled_from([0, 0, 3]))
    def make(self, pages: int, huge: int) -> None:
        self.order, self.settled = order_of(pages, huge)
        self.count = self.settled.page_count
        self.under_way: set[int] = set()
        self.requests: list[PushRequest] = []

    @rule(credit=st.integers(1, 12))
    def ask(self, credit: int) -> None:
        request = self.order.next(credit * PAGE_SIZE, 1.0)
        missing = {page for page in range(self.count) if page not in self.settled}
        if request is None:
            assert missing <= self.under_way
            return
        pages = pages_of(request.runs)
        assert len(set(pages)) == len(pages)
        assert not set(pages) & self.under_way
        assert set(pages) <= missing
        assert len(request.runs) <= MAX_RUNS
        assert PAGE_SIZE <= request.credit <= min(credit, len(pages)) * PAGE_SIZE
        self.under_way.update(pages)
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(share=st.floats(0, 1), used=st.floats(0, 1), settle=st.booleans())
    def answer(self, share: float, used: float, settle: bool) -> None:
        """The source answers a part; what has come is settled now, or stays under way until it is."""
        request = self.requests.pop(0)
        pages = pages_of(request.runs)
        came = max(1, round(share * len(pages)))
        rest, left = [], came
        for first, length in request.runs:
            skip = min(left, length)
            left -= skip
            if skip < length:
                rest.append((first + skip, length - skip))
        self.order.answered(request, min(request.credit, round(used * came) * PAGE_SIZE), rest)
        self.under_way.difference_update(pages[came:])
        if settle:
            for page in pages[:came]:
                self.settle(page)

    @rule(data=st.data())
    def settle_otherwise(self, data: st.DataObject) -> None:
        self.settle(data.draw(st.integers(0, self.count - 1)))

    def settle(self, page: int) -> None:
        self.settled.add(page, 1)
        self.order.settled(page, 1)
        self.under_way.discard(page)

    @rule(data=st.data())
    def follow(self, data: st.DataObject) -> None:
        self.order.follow(data.draw(st.integers(0, self.count)))

    @rule()
    def lose(self) -> None:
        self.order.lost()
        self.under_way.clear()
        self.requests.clear()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "order"):
            assert {page for page in range(self.count) if self.order.is_under_way(page)} == self.under_way
            free = [page for run in self.order.free(0, self.count) for page in range(run[0], sum(run))]
            assert free == [page for page in range(self.count) if page not in self.under_way]


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.integers(1, 300), st.integers(0, 3), st.integers(0, 347), st.integers(1, 70))
def test_requests_cover_everything_once_wherever_they_begin(pages: int, huge: int, start: int, credit: int) -> None:
    order, settled = order_of(pages, huge)
    order.follow(start % settled.page_count)
    seen: list[int] = []
    while (request := order.next(credit * PAGE_SIZE, 0.0)) is not None:
        seen += pages_of(request.runs)
    assert sorted(seen) == list(range(settled.page_count))


def test_push_goes_on_behind_the_latest_fault() -> None:
    order, _ = order_of(1000)
    order.follow(500)
    request = order.next(4 * PAGE_SIZE, 0.0)
    assert request is not None
    assert request.runs == ((500, 4),)


def test_holes_let_a_request_stretch_and_full_memory_ends_that() -> None:
    order, settled = order_of(MAX_STRETCH_PAGES * 3)
    credit = 16 * PAGE_SIZE
    lengths = []
    for _ in range(8):
        request = order.next(credit, 0.0)
        assert request is not None
        lengths.append(len(pages_of(request.runs)))
        order.answered(request, 0, [])
        settled.add(*request.runs[0])
        order.settled(*request.runs[0])
    assert lengths[:3] == [16, 64, 256]
    assert max(lengths) == MAX_STRETCH_PAGES
    order.follow(2 * MAX_STRETCH_PAGES)
    request = order.next(credit, 0.0)
    assert request is not None
    first, pages = request.runs[0]
    order.answered(request, credit, [(first + 16, pages - 16)])
    # What the credit did not pay for comes next, in small steps again.
    following = order.next(credit, 0.0)
    assert following is not None
    assert following.runs == ((first + 16, 16),)


def test_a_younger_fault_goes_before_what_was_asked_for_in_vain() -> None:
    order, _ = order_of(1000)
    request = order.next(8 * PAGE_SIZE, 0.0)
    assert request is not None
    order.follow(700)
    order.answered(request, 4 * PAGE_SIZE, [(4, 4)])
    following = order.next(8 * PAGE_SIZE, 0.0)
    assert following is not None
    assert following.runs == ((700, 8),)


def test_a_granule_that_was_begun_is_finished_before_the_order_jumps() -> None:
    order, _ = order_of(0 + 16, huge=4)
    order.follow(16)
    assert order.next(10 * PAGE_SIZE, 0.0).runs == ((16, 10),)  # type: ignore[union-attr]
    order.follow(64)
    request = order.next(10 * PAGE_SIZE, 0.0)
    assert request is not None
    assert request.runs == ((26, 6), (64, 4))


def test_a_granule_that_came_in_part_is_finished_before_the_order_jumps() -> None:
    order, _ = order_of(16, huge=4)
    order.follow(16)
    request = order.next(10 * PAGE_SIZE, 0.0)
    assert request is not None
    order.follow(64)
    order.answered(request, 3 * PAGE_SIZE, [(19, 7)])
    following = order.next(20 * PAGE_SIZE, 0.0)
    assert following is not None
    assert pages_of(following.runs)[:13] == [*range(26, 32), *range(19, 26)]


def test_no_request_names_more_runs_than_the_contract_allows() -> None:
    order, settled = order_of(4 * MAX_RUNS)
    for page in range(0, settled.page_count, 2):
        settled.add(page, 1)
    request = order.next(16 << 20, 0.0)
    assert request is not None
    assert len(request.runs) == MAX_RUNS
