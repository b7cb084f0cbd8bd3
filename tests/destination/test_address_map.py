"""The address map against plain arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.address_map import AddressMap


@st.composite
def maps(draw: st.DrawFn) -> AddressMap:
    """Up to 6 regions, at addresses in an order of their own, some side by side."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    gaps = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    order = draw(st.permutations(range(len(sizes))))
    addresses = [0] * len(sizes)
    at = draw(st.integers(1, 1 << 40)) * PAGE_SIZE
    for index in order:
        at += gaps[index] * PAGE_SIZE
        addresses[index] = at
        at += sizes[index] * PAGE_SIZE
    layout = Layout([Region(number << 40, size * PAGE_SIZE) for number, size in enumerate(sizes)])
    return AddressMap(layout, addresses)


def pages_by_address(addresses: AddressMap) -> dict[int, int]:
    """Page numbers by address, one by one."""
    pages = {}
    for address, region, start in zip(
        addresses.addresses, addresses.layout.regions, addresses.layout.starts, strict=True
    ):
        for number in range(region.size // PAGE_SIZE):
            pages[address + number * PAGE_SIZE] = start + number
    return pages


@given(maps(), st.integers(0, PAGE_SIZE - 1))
def test_each_byte_of_each_page_leads_to_the_page_and_back(addresses: AddressMap, into: int) -> None:
    for address, page in pages_by_address(addresses).items():
        assert addresses.page_at(address + into) == page
        assert addresses.address_of(page) == address


@given(maps())
def test_bytes_outside_the_guests_memory_lead_nowhere(addresses: AddressMap) -> None:
    known = pages_by_address(addresses)
    for address in known:
        for outside in (address - PAGE_SIZE, address + PAGE_SIZE):
            assert addresses.page_at(outside) == known.get(outside)
    assert addresses.page_at(0) is None
    assert addresses.page_at(2**64 - 1) is None


@given(maps(), st.data())
def test_spans_of_a_run_are_its_pages_in_order(addresses: AddressMap, data: st.DataObject) -> None:
    count = addresses.layout.page_count
    first = data.draw(st.integers(0, count - 1))
    pages = data.draw(st.integers(1, count - first))
    known = pages_by_address(addresses)
    listed = [
        known[address + number * PAGE_SIZE]
        for address, length in addresses.spans(first, pages)
        for number in range(length)
    ]
    assert listed == list(range(first, first + pages))


@given(maps(), st.data())
def test_runs_of_a_range_are_all_pages_that_any_byte_of_it_lies_in(addresses: AddressMap, data: st.DataObject) -> None:
    known = pages_by_address(addresses)
    low, high = min(known) - 2 * PAGE_SIZE, max(known) + 2 * PAGE_SIZE
    start = data.draw(st.integers(low, high))
    end = data.draw(st.integers(start, high + PAGE_SIZE))
    listed = [page for first, pages in addresses.runs(start, end) for page in range(first, first + pages)]
    expected = {
        page for address, page in known.items() if address < end and address + PAGE_SIZE > start and start < end
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


@pytest.mark.parametrize(
    "addresses",
    [
        (0, 0x10000),
        (0x10001, 0x20000),
        (0x10000, 0x10000),
        (0x10000, 0x11000),
        (0x11000, 0x10000),
        (2**64 - 2 * PAGE_SIZE, 0x10000),
        (-PAGE_SIZE, 0x10000),
    ],
)
def test_addresses_that_cannot_be_are_refused(addresses: tuple[int, int]) -> None:
    layout = Layout([Region(0, 2 * PAGE_SIZE), Region(1 << 32, 2 * PAGE_SIZE)])
    with pytest.raises(FerryError) as refused:
        AddressMap(layout, addresses)
    assert refused.value.reason is Reason.HANDOFF_REGIONS


def test_huge_pages_lie_at_addresses_of_their_size() -> None:
    layout = Layout([Region(0, 2 << 20, 2 << 20)])
    assert AddressMap(layout, [4 << 20]).address_of(511) == (4 << 20) + 511 * PAGE_SIZE
    with pytest.raises(FerryError):
        AddressMap(layout, [(4 << 20) + PAGE_SIZE])
