"""A set of pages, against Python's own set."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pageferryd.core.page_set import CHUNK_PAGES, PageSet

# Sizes around the borders of chunks, and positions that gather there.
SIZES = st.sampled_from([1, 7, CHUNK_PAGES - 1, CHUNK_PAGES, CHUNK_PAGES + 1, 3 * CHUNK_PAGES, 3 * CHUNK_PAGES + 100])


def edges(size: int) -> list[int]:
    near = {0, size - 1, *(at + by for at in range(0, size + 1, CHUNK_PAGES) for by in (-2, -1, 0, 1, 2))}
    return sorted(page for page in near if 0 <= page < size)


class AgainstASet(RuleBasedStateMachine):
    @initialize(size=SIZES)
    def make(self, size: int) -> None:
        self.size = size
        self.pages = PageSet(size)
        self.model: set[int] = set()
        self.near = edges(size)

    def draw_run(self, data: st.DataObject) -> tuple[int, int]:
        first = data.draw(st.one_of(st.sampled_from(self.near), st.integers(0, self.size - 1)))
        room = self.size - first
        return first, data.draw(st.one_of(st.integers(1, min(5, room)), st.just(room), st.integers(1, room)))

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        first, count = self.draw_run(data)
        new = set(range(first, first + count)) - self.model
        assert self.pages.add(first, count) == len(new)
        self.model |= new

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        first, count = self.draw_run(data)
        gone = self.model & set(range(first, first + count))
        assert self.pages.remove(first, count) == len(gone)
        self.model -= gone

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        first, count = self.draw_run(data)
        stop = first + count
        members = [page for page in range(first, stop) if page in self.model]
        assert self.pages.next_present(first, stop) == (members[0] if members else stop)
        absent = next((page for page in range(first, stop) if page not in self.model), stop)
        assert self.pages.next_absent(first, stop) == absent
        assert self.pages.holds_all(first, count) == (len(members) == count)
        runs = list(self.pages.absent_runs(first, count))
        assert {page for start, length in runs for page in range(start, start + length)} == (
            set(range(first, stop)) - set(members)
        )
        # Runs are as long as can be.
        assert all(before[0] + before[1] < after[0] for before, after in pairwise(runs))

    @invariant()
    def same_members(self) -> None:
        if hasattr(self, "pages"):
            assert len(self.pages) == self.pages.count == len(self.model)
            assert all((page in self.pages) == (page in self.model) for page in self.near)


TestAgainstASet = AgainstASet.TestCase
TestAgainstASet.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@given(st.integers(1, 100), st.data())
def test_an_empty_run_has_no_members_and_no_gaps(size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, size))
    pages = PageSet(size)
    assert pages.next_absent(at, at) == pages.next_present(at, at) == at
    assert list(pages.absent_runs(at, 0)) == []


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_a_full_set_needs_no_bitmaps(order: str) -> None:
    size = 4 * CHUNK_PAGES + 5
    tracemalloc.start()
    try:
        pages = PageSet(size)
        starts = range(0, size, 1000) if order == "forwards" else reversed(range(0, size, 1000))
        for first in starts:
            pages.add(first, min(1000, size - first))
        assert pages.holds_all(0, size)
        assert tracemalloc.get_traced_memory()[0] < 2048
    finally:
        tracemalloc.stop()
    assert pages.remove(0, size) == size
    assert pages.next_present(0, size) == size
