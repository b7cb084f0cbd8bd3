"""Layouts: many regions in one flat space of page numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferryd.core.errors import LayoutError, PageRangeError
from pageferryd.core.layout import MAX_PAGES, MAX_REGIONS, PAGE_SIZE, Layout, Region

HUGE = 64 << 10


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    regions, address = [], 0
    for _ in range(draw(st.integers(1, 6))):
        page_size = draw(st.sampled_from([PAGE_SIZE, HUGE]))
        address += draw(st.integers(0, 4)) * HUGE
        pages = draw(st.integers(1, 40)) * page_size // PAGE_SIZE
        regions.append(Region(address, pages * PAGE_SIZE, page_size))
        address += -(-pages * PAGE_SIZE // HUGE) * HUGE
    return Layout(draw(st.permutations(regions)))


@given(layouts())
def test_regions_follow_one_another_without_gaps_in_page_numbers(layout: Layout) -> None:
    numbers = [
        (index, page)
        for index, region in enumerate(layout.regions)
        for page in range(layout.starts[index], layout.starts[index] + region.size // PAGE_SIZE)
    ]
    assert [page for _, page in numbers] == list(range(layout.page_count))
    for index, page in numbers:
        assert layout.region_of(page) == index
        assert layout.end_of_region(page) == layout.starts[index] + layout.regions[index].size // PAGE_SIZE


@given(layouts(), st.data())
def test_pieces_cover_a_run_in_order_and_stay_inside_their_regions(layout: Layout, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, layout.page_count - 1))
    count = data.draw(st.integers(1, layout.page_count - first))
    covered = []
    for piece in layout.pieces(first, count):
        assert piece.first >= 0
        assert 0 < piece.pages <= layout.regions[piece.region].size // PAGE_SIZE - piece.first
        start = layout.starts[piece.region] + piece.first
        covered += range(start, start + piece.pages)
    assert covered == list(range(first, first + count))


@given(layouts(), st.data())
def test_a_granule_holds_its_page_is_aligned_in_guest_memory_and_stays_in_its_region(
    layout: Layout, data: st.DataObject
) -> None:
    page = data.draw(st.integers(0, layout.page_count - 1))
    first, pages = layout.granule(page)
    index = layout.region_of(page)
    region = layout.regions[index]
    assert first <= page < first + pages
    assert pages * PAGE_SIZE == region.page_size
    assert (region.guest_address + (first - layout.starts[index]) * PAGE_SIZE) % region.page_size == 0
    assert layout.starts[index] <= first
    assert first + pages <= layout.end_of_region(page)
    assert all(layout.granule(other) == (first, pages) for other in (first, first + pages - 1))


@given(layouts(), st.integers(-3, 400), st.integers(-3, 400))
def test_a_run_is_accepted_exactly_when_it_lies_inside(layout: Layout, first: int, count: int) -> None:
    inside = first >= 0 and count > 0 and first + count <= layout.page_count
    if inside:
        layout.check(first, count)
        return
    with pytest.raises(PageRangeError) as raised:
        layout.check(first, count)
    assert raised.value.reason == "PAGE_OUT_OF_RANGE"


@pytest.mark.parametrize("page", [-1, 4])
def test_a_page_outside_has_no_region(page: int) -> None:
    with pytest.raises(PageRangeError):
        Layout([Region(0, 4 * PAGE_SIZE)]).region_of(page)


@pytest.mark.parametrize(
    ("regions", "complaint"),
    [
        ([], "0 regions"),
        ([Region(0, 0)], "not whole pages"),
        ([Region(0, -PAGE_SIZE)], "not whole pages"),
        ([Region(0, PAGE_SIZE + 1)], "not whole pages"),
        ([Region(0, PAGE_SIZE, HUGE)], "not whole pages"),
        ([Region(1, PAGE_SIZE)], "not aligned"),
        ([Region(PAGE_SIZE, HUGE, HUGE)], "not aligned"),
        ([Region(-PAGE_SIZE, PAGE_SIZE)], "not aligned"),
        ([Region(0, PAGE_SIZE, 8192)], "no such backing"),
        ([Region(0, PAGE_SIZE, 0)], "no such backing"),
        ([Region((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE)], "beyond the address space"),
        ([Region(0, 2 * PAGE_SIZE), Region(PAGE_SIZE, PAGE_SIZE)], "overlap"),
        ([Region(PAGE_SIZE, PAGE_SIZE), Region(0, 2 * PAGE_SIZE)], "overlap"),
        ([Region(0, PAGE_SIZE), Region(0, PAGE_SIZE)], "overlap"),
        ([Region(0, (MAX_PAGES + 1) * PAGE_SIZE)], "more than"),
        ([Region(at * PAGE_SIZE, PAGE_SIZE) for at in range(MAX_REGIONS + 1)], "regions; there must be"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_its_reason(regions: list[Region], complaint: str) -> None:
    with pytest.raises(LayoutError, match=complaint) as raised:
        Layout(regions)
    assert raised.value.reason == "LAYOUT_INVALID"


def test_layouts_are_the_same_when_only_the_backing_differs() -> None:
    plain, huge = Layout([Region(0, HUGE)]), Layout([Region(0, HUGE, HUGE)])
    assert plain.same_as(huge)
    assert plain.uniform
    assert not huge.uniform
    assert not plain.same_as(Layout([Region(HUGE, HUGE)]))
    assert not plain.same_as(Layout([Region(0, HUGE), Region(HUGE, HUGE)]))
