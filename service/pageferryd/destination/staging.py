"""Staging: pages that can only be installed together wait here for one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.page_set import PageSet
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

if TYPE_CHECKING:
    from pageferryd.core.layout import Layout


class Whole(NamedTuple):
    """A granule that is complete: its run, and its bytes where it is raw."""

    run: Run
    data: bytes


@dataclass(slots=True)
class _Granule:
    data: bytearray
    missing: set[int] = field(default_factory=set)
    raw: bool = False
    poisoned: bool = False


class Staging:
    """Huge pages in the making. As many as are under way on the lanes, whose windows bound them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._granules: dict[int, _Granule] = {}
        # Single pages of granules that the guest gave away before the whole had come: zero, whatever comes for them.
        self._holes = PageSet(layout.page_count)

    def __len__(self) -> int:
        return len(self._granules)

    def add(self, run: Run, data: bytes, offset: int) -> list[Whole]:
        """Take pages of granules; return those granules that this completed. One poisoned page poisons its granule."""
        ready: list[Whole] = []
        first, left = run.first, run.pages
        while left:
            start, size = self._layout.granule(first)
            take = min(left, start + size - first)
            granule = self._granules.get(start)
            if granule is None:
                granule = self._granules[start] = _Granule(bytearray(size * PAGE_SIZE), set(range(start, start + size)))
            self._fill(granule, first - start, Run(first, take, run.kind), data, offset)
            if not granule.missing:
                ready.append(self._finish(start, size))
            if run.kind == RAW:
                offset += take * PAGE_SIZE
            first += take
            left -= take
        return ready

    @staticmethod
    def _fill(granule: _Granule, into: int, run: Run, data: bytes, offset: int) -> None:
        granule.missing.difference_update(range(run.first, run.first + run.pages))
        if run.kind == RAW:
            size = run.pages * PAGE_SIZE
            granule.data[into * PAGE_SIZE : into * PAGE_SIZE + size] = memoryview(data)[offset : offset + size]
            granule.raw = True
        elif run.kind == POISONED:
            granule.poisoned = True

    def _finish(self, start: int, size: int) -> Whole:
        granule = self._granules.pop(start)
        for page in range(start, start + size) if self._holes.count else ():
            if page in self._holes:
                into = (page - start) * PAGE_SIZE
                granule.data[into : into + PAGE_SIZE] = bytes(PAGE_SIZE)
        self._holes.remove(start, size)
        if granule.poisoned:
            return Whole(Run(start, size, POISONED), b"")
        if granule.raw:
            return Whole(Run(start, size, RAW), bytes(granule.data))
        return Whole(Run(start, size, ZERO), b"")

    def punch(self, first: int, pages: int) -> None:
        """The guest gave a part of a granule away that is not installed yet: that part of it will be zero."""
        self._holes.add(first, pages)

    def drop(self, first: int, pages: int) -> None:
        """Forget granules that lie in a run: the guest gave them away."""
        for start in [start for start in self._granules if first <= start < first + pages]:
            del self._granules[start]
