"""The memory layout: many regions, one flat space of page numbers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.errors import LayoutError, PageRangeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE_SIZE = 4096
MAX_REGIONS = 4096
MAX_PAGES = 1 << 40
_BACKING_SIZES = frozenset({PAGE_SIZE, 64 << 10, 1 << 20, 2 << 20, 16 << 20, 32 << 20, 512 << 20, 1 << 30})


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous guest-physical range: address, size and backing page size, all in bytes."""

    guest_address: int
    size: int
    page_size: int = PAGE_SIZE

    def check(self) -> None:
        """Raise LayoutError unless the region is whole pages at an aligned address."""
        if self.page_size not in _BACKING_SIZES:
            raise LayoutError(f"region at {self.guest_address:#x}: no such backing page size: {self.page_size}")
        if self.size <= 0 or self.size % self.page_size:
            raise LayoutError(f"region at {self.guest_address:#x}: size {self.size} is not whole pages")
        if self.guest_address < 0 or self.guest_address % self.page_size:
            raise LayoutError(f"region at {self.guest_address:#x}: address is not aligned to {self.page_size}")
        if self.guest_address + self.size > 1 << 64:
            raise LayoutError(f"region at {self.guest_address:#x}: ends beyond the address space")


class Piece(NamedTuple):
    """A run of pages inside one region: the region's index, the first page within it, the length in pages."""

    region: int
    first: int
    pages: int


class Layout:
    """The regions of a guest in order. Raises LayoutError where they overlap, are unaligned, empty or too many."""

    def __init__(self, regions: Sequence[Region]) -> None:
        if not 0 < len(regions) <= MAX_REGIONS:
            raise LayoutError(f"{len(regions)} regions; there must be 1 to {MAX_REGIONS}")
        for region in regions:
            region.check()
        ordered = sorted(regions, key=lambda region: region.guest_address)
        for before, after in pairwise(ordered):
            if before.guest_address + before.size > after.guest_address:
                raise LayoutError(f"regions at {before.guest_address:#x} and {after.guest_address:#x} overlap")
        self.regions = tuple(regions)
        starts = [0]
        for region in regions:
            starts.append(starts[-1] + region.size // PAGE_SIZE)
        self.starts = tuple(starts[:-1])
        """First page number of each region."""
        self.stops = tuple(starts[1:])
        """First page number behind each region."""
        self.page_count = starts[-1]
        if self.page_count > MAX_PAGES:
            raise LayoutError(f"{self.page_count} pages are more than {MAX_PAGES}")
        self.uniform = all(region.page_size == PAGE_SIZE for region in regions)
        """True when every page can be installed by itself."""

    def check(self, first: int, count: int) -> None:
        """Raise PageRangeError unless the run lies inside the layout."""
        if first < 0 or count <= 0 or first + count > self.page_count:
            raise PageRangeError(f"pages {first} to {first + count} are outside the guest's {self.page_count} pages")

    def region_of(self, page: int) -> int:
        """Return the index of the region that holds the page."""
        self.check(page, 1)
        return bisect_right(self.starts, page) - 1

    def end_of_region(self, page: int) -> int:
        """Return the first page number behind the region that holds the page, which must be in the layout."""
        return self.stops[bisect_right(self.starts, page) - 1]

    def run_at(self, guest_address: int, size: int) -> tuple[int, int]:
        """Return the pages of a guest-physical range, as (first, pages).

        Raises PageRangeError unless it consists of whole pages inside one region.
        """
        for region, start in zip(self.regions, self.starts, strict=True):
            offset = guest_address - region.guest_address
            if offset >= 0 and size > 0 and offset + size <= region.size and not offset % PAGE_SIZE | size % PAGE_SIZE:
                return start + offset // PAGE_SIZE, size // PAGE_SIZE
        raise PageRangeError(f"{size} bytes at {guest_address:#x} are not whole pages within one region of the guest")

    def guest_address_of(self, page: int) -> int:
        """Return the guest-physical address of a page's first byte."""
        region = self.region_of(page)
        return self.regions[region].guest_address + (page - self.starts[region]) * PAGE_SIZE

    def pieces(self, first: int, count: int) -> Iterator[Piece]:
        """Cut a run at the borders of regions."""
        self.check(first, count)
        index = bisect_right(self.starts, first) - 1
        while count:
            start = self.starts[index]
            take = min(count, self.stops[index] - first)
            yield Piece(index, first - start, take)
            first += take
            count -= take
            index += 1

    def granule(self, page: int) -> tuple[int, int]:
        """Return the run of pages that must be installed together with the page: (first, count)."""
        if self.uniform:
            return page, 1
        index = self.region_of(page)
        pages = self.regions[index].page_size // PAGE_SIZE
        start = self.starts[index]
        return page - (page - start) % pages, pages

    def same_as(self, other: Layout) -> bool:
        """Say whether both have the same regions; backing page sizes may differ."""
        return [(r.guest_address, r.size) for r in self.regions] == [(r.guest_address, r.size) for r in other.regions]
