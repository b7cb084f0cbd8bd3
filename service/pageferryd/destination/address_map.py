"""Where each page of a guest lies in the address space of its VMM."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pageferryd.core.layout import Layout


class AddressMap:
    """Page number ↔ address in the VMM, by region. Addresses are in bytes, in the order of the layout's regions."""

    def __init__(self, layout: Layout, addresses: Sequence[int]) -> None:
        """Raise FerryError(HANDOFF_REGIONS) where an address is unaligned, beyond the address space, or overlaps."""
        self.layout = layout
        self.addresses = tuple(addresses)
        spans = sorted(
            (address, address + region.size) for address, region in zip(addresses, layout.regions, strict=True)
        )
        for address, region in zip(addresses, layout.regions, strict=True):
            if address <= 0 or address % region.page_size or address + region.size >= 1 << 64:
                raise FerryError(
                    Reason.HANDOFF_REGIONS,
                    f"a region of {region.size} bytes at {address:#x} is not aligned to {region.page_size} bytes, "
                    "or beyond the address space",
                )
        for before, after in pairwise(spans):
            if before[1] > after[0]:
                raise FerryError(Reason.HANDOFF_REGIONS, f"regions at {before[0]:#x} and {after[0]:#x} overlap")
        by_address = sorted(range(len(addresses)), key=lambda index: addresses[index])
        self._bases = [addresses[index] for index in by_address]
        self._ends = [addresses[index] + layout.regions[index].size for index in by_address]
        self._starts = [layout.starts[index] for index in by_address]

    def page_at(self, address: int) -> int | None:
        """Return the page that holds the address, or None outside the guest's memory."""
        index = bisect_right(self._bases, address) - 1
        if index < 0 or address >= self._ends[index]:
            return None
        return self._starts[index] + (address - self._bases[index]) // PAGE_SIZE

    def address_of(self, page: int) -> int:
        """Return the address of a page's first byte."""
        layout = self.layout
        index = bisect_right(layout.starts, page) - 1
        return self.addresses[index] + (page - layout.starts[index]) * PAGE_SIZE

    def spans(self, first: int, pages: int) -> Iterator[tuple[int, int]]:
        """Yield where a run lies, as (address, pages): one span a region."""
        for piece in self.layout.pieces(first, pages):
            yield self.addresses[piece.region] + piece.first * PAGE_SIZE, piece.pages

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the pages that lie wholly or partly in [start, end), as (first, pages): one run a region."""
        index = max(bisect_right(self._bases, start) - 1, 0)
        while index < len(self._bases) and self._bases[index] < end:
            low, high = max(start, self._bases[index]), min(end, self._ends[index])
            if low < high:
                first = (low - self._bases[index]) // PAGE_SIZE
                stop = -(-(high - self._bases[index]) // PAGE_SIZE)
                yield self._starts[index] + first, stop - first
            index += 1
