"""Staging against a plain model: granules come out once, whole, as their pages were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.runs import POISONED, RAW, ZERO, Run
from pageferryd.destination.intake import whole_granules
from pageferryd.destination.staging import Staging, Whole

GRANULE = 16
HUGE = GRANULE * PAGE_SIZE
LAYOUT = Layout([Region(0, 2 * HUGE, HUGE), Region(1 << 32, 2 * HUGE, HUGE)])
KINDS = (RAW, RAW, ZERO, POISONED)


def page_bytes(page: int) -> bytes:
    return bytes([page + 1, 7]) * (PAGE_SIZE // 2)


class Model:
    """Pages one by one. The source stands still: a page that comes twice is the same both times."""

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}

    def add(self, run: Run) -> list[Whole]:
        """Add what comes for one granule after another; a granule is out when its last page is here."""
        out = []
        for start in range(run.first - run.first % GRANULE, run.first + run.pages, GRANULE):
            members = range(start, start + GRANULE)
            self.pages.update({page: run.kind for page in members if run.first <= page < run.first + run.pages})
            if all(page in self.pages for page in members):
                kinds = {page: self.pages.pop(page) for page in members}
                data = b"".join(page_bytes(page) if kinds[page] == RAW else bytes(PAGE_SIZE) for page in members)
                found = set(kinds.values())
                kind = POISONED if POISONED in found else RAW if RAW in found else ZERO
                out.append(Whole(Run(start, GRANULE, kind), data if kind == RAW else b""))
        return out

    def drop(self, first: int, pages: int) -> None:
        for page in range(first, first + pages):
            self.pages.pop(page, None)


@given(st.data(), st.lists(st.sampled_from(KINDS), min_size=LAYOUT.page_count, max_size=LAYOUT.page_count))
def test_granules_come_out_whole_and_once(data: st.DataObject, kinds: list[int]) -> None:
    staging, model = Staging(LAYOUT), Model()
    for _ in range(data.draw(st.integers(1, 30))):
        first = data.draw(st.integers(0, LAYOUT.page_count - 1))
        if data.draw(st.integers(0, 9)) == 0:
            # What is given away is whole granules.
            start = first - first % GRANULE
            staging.drop(start, GRANULE)
            model.drop(start, GRANULE)
            continue
        longest = next((n for n, kind in enumerate(kinds[first:]) if kind != kinds[first]), LAYOUT.page_count - first)
        run = Run(first, data.draw(st.integers(1, longest)), kinds[first])
        body = b"ahead"
        if run.kind == RAW:
            body += b"".join(map(page_bytes, range(first, first + run.pages)))
        assert staging.add(run, body, len(b"ahead")) == model.add(run)
        assert len(staging) == len({page // GRANULE for page in model.pages})


def test_what_was_dropped_is_asked_for_as_a_whole_again() -> None:
    staging = Staging(LAYOUT)
    assert staging.add(Run(0, GRANULE - 1, ZERO), b"", 0) == []
    staging.drop(0, GRANULE)
    assert len(staging) == 0
    assert staging.add(Run(GRANULE - 1, 1, ZERO), b"", 0) == []
    assert staging.add(Run(0, GRANULE - 1, ZERO), b"", 0) == [Whole(Run(0, GRANULE, ZERO), b"")]


def test_a_zero_page_between_raw_ones_is_zero_in_the_granule() -> None:
    staging = Staging(LAYOUT)
    staging.add(Run(0, 2, RAW), page_bytes(0) + page_bytes(1), 0)
    staging.add(Run(2, 1, ZERO), b"", 0)
    staging.add(Run(4, GRANULE - 4, ZERO), b"", 0)
    (whole,) = staging.add(Run(3, 1, RAW), page_bytes(3), 0)
    assert whole.data == page_bytes(0) + page_bytes(1) + bytes(PAGE_SIZE) + page_bytes(3) + bytes(HUGE - 4 * PAGE_SIZE)


def test_a_part_that_was_given_away_is_zero_when_its_granule_comes() -> None:
    staging = Staging(LAYOUT)
    staging.punch(3, 2)
    data = b"".join(map(page_bytes, range(2 * GRANULE)))
    first, second = staging.add(Run(0, 2 * GRANULE, RAW), data, 0)
    expected = [bytes(PAGE_SIZE) if page in (3, 4) else page_bytes(page) for page in range(GRANULE)]
    assert first.data == b"".join(expected)
    assert second.data == data[HUGE:]


def test_a_run_is_cut_where_it_leaves_whole_granules() -> None:
    mixed = Layout([Region(0, 4 * PAGE_SIZE), Region(1 << 32, 2 * HUGE, HUGE)])
    assert list(whole_granules(mixed, 1, 3 + GRANULE + 5)) == [
        (1, 3, True),
        (4, GRANULE, True),
        (4 + GRANULE, 5, False),
    ]
    assert list(whole_granules(mixed, 6, 2)) == [(6, 2, False)]
