"""Staging: pages that can only be installed together wait here for one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.checksums import CHECKSUM_SIZE, checksums_of
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.page_set import PageSet
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.core.layout import Layout

_ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_CHECKSUM = checksums_of([_ZERO_PAGE])


class Whole(NamedTuple):
    """A granule that is complete: its run, and its bytes where it is raw.

    `checksums` are those of all its pages, 8 bytes each, where they came with any.
    """

    run: Run
    data: bytes
    checksums: bytes = b""


class _Granule:
    """Pages of one granule that have come: a buffer once one of them has bytes, and checksums of all of that."""

    __slots__ = ("checksums", "data", "poisoned")

    def __init__(self) -> None:
        self.data: bytearray | None = None
        self.checksums: bytearray | None = None
        self.poisoned = False

    def blank(self, page: int) -> None:
        """Make zeroes of a page, which is counted within the granule, once there are bytes."""
        if self.data is not None:
            self.data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = _ZERO_PAGE
        if self.checksums is not None:
            self.checksums[page * CHECKSUM_SIZE : (page + 1) * CHECKSUM_SIZE] = _ZERO_CHECKSUM


class Staging:
    """Huge pages in the making. As many as are under way on the lanes, whose windows bound them.

    A page has come when its bytes are here, or when it is blank: its shared side will be zero, since it is private to
    the guest or was given away. A granule of blank pages alone is nobody's to install.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._granules: dict[int, _Granule] = {}
        # All of a granule's, from the moment it is complete.
        self._come = PageSet(layout.page_count)
        self._blank = PageSet(layout.page_count)

    def __len__(self) -> int:
        return len(self._granules)

    def add(self, run: Run, data: bytes, offset: int, checksums: int = 0) -> list[int]:
        """Take pages of granules; return the first page of each granule that this completed.

        `checksums` is where those of raw pages begin in `data`, and 0 where there are none.
        """
        for start, size, first, pages in self._parts(run.first, run.pages):
            granule = self._granules.setdefault(start, _Granule())
            if run.kind == RAW:
                if granule.data is None:
                    granule.data = bytearray(size * PAGE_SIZE)
                into, length = (first - start) * PAGE_SIZE, pages * PAGE_SIZE
                granule.data[into : into + length] = memoryview(data)[offset : offset + length]
                offset += length
                if checksums:
                    if granule.checksums is None:
                        granule.checksums = bytearray(_ZERO_CHECKSUM * size)
                    into, length = (first - start) * CHECKSUM_SIZE, pages * CHECKSUM_SIZE
                    granule.checksums[into : into + length] = data[checksums : checksums + length]
                    checksums += length
            elif run.kind == POISONED:
                granule.poisoned = True
            elif granule.checksums is not None:
                # A damaged copy of it may be here.
                for page in range(first - start, first - start + pages):
                    granule.blank(page)
            self._come.add(first, pages)
        return self._complete(run.first, run.pages)

    def blank(self, first: int, pages: int) -> list[int]:
        """Note that pages are zero on their shared side, whatever else comes; returns what `add` does."""
        if self._layout.granule(first)[1] == 1:
            return []
        self._blank.add(first, pages)
        return self._complete(first, pages) if self._come.add(first, pages) else []

    def whole(self, start: int) -> Whole | None:
        """Return a granule by its first page if it is complete: it may have been given away meanwhile or put in place.

        One poisoned page poisons all of it.
        """
        granule = self._granules.get(start)
        _, size = self._layout.granule(start)
        if granule is None or not self._come.holds_all(start, size):
            return None
        if granule.poisoned:
            return Whole(Run(start, size, POISONED), b"")
        if granule.data is None:
            return Whole(Run(start, size, ZERO), b"")
        page, stop = start, start + size
        while (page := self._blank.next_present(page, stop)) < stop:
            granule.blank(page - start)
            page += 1
        return Whole(Run(start, size, RAW), bytes(granule.data), bytes(granule.checksums or b""))

    def take_back(self, page: int) -> None:
        """A page of a granule was damaged: it has not come. Its bytes stay, and do not match, until it comes again."""
        self._come.remove(page, 1)

    def finish(self, start: int) -> None:
        """A granule is in place: its bytes are needed no more."""
        del self._granules[start]
        self._blank.remove(*self._layout.granule(start))

    def to_come(self, first: int, stop: int) -> int:
        """Return the first page of [first, stop) that has not come yet, or `stop`."""
        return self._come.next_absent(first, stop)

    def drop(self, first: int, pages: int) -> None:
        """Forget granules that lie in a run: the guest gave them away."""
        for start in [start for start in self._granules if first <= start < first + pages]:
            del self._granules[start]
        self._come.remove(first, pages)
        self._blank.remove(first, pages)

    def _complete(self, first: int, pages: int) -> list[int]:
        """Return which granules with a page in the run can be put in place."""
        return [
            start
            for start, size, _, _ in self._parts(first, pages)
            if start in self._granules and self._come.holds_all(start, size)
        ]

    def _parts(self, first: int, pages: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut a run into granules; yields each one's first page and size, and the run's first page and length in it."""
        stop = first + pages
        while first < stop:
            start, size = self._layout.granule(first)
            end = min(stop, start + size)
            yield start, size, first, end - first
            first = end
