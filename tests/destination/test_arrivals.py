"""The picture of arrivals counts every page once, in the cell that it lies in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.pager import Lane
from pageferryd.destination.arrivals import MAX_CELLS, ArrivalMap


@given(st.integers(1, 5000), st.data())
def test_each_page_counts_in_its_cell(page_count: int, data: st.DataObject) -> None:
    arrivals = ArrivalMap(page_count)
    assert 0 < len(arrivals.demand) == len(arrivals.push) <= MAX_CELLS
    assert (len(arrivals.demand) - 1) * arrivals.pages_per_cell < page_count
    assert page_count <= len(arrivals.demand) * arrivals.pages_per_cell

    first = data.draw(st.integers(0, page_count - 1))
    pages = data.draw(st.integers(1, page_count - first))
    lane = data.draw(st.sampled_from(list(Lane)))
    arrivals.note(first, pages, lane)
    counted = arrivals.demand if lane is Lane.DEMAND else arrivals.push
    expected = [0] * len(counted)
    for page in range(first, first + pages):
        expected[page // arrivals.pages_per_cell] += 1
    assert counted == expected
    assert not any(arrivals.push if lane is Lane.DEMAND else arrivals.demand)
