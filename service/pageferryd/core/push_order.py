"""Push order: which missing runs come next. It goes on behind the latest fault, since a guest has locality."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.page_set import PageSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.core.layout import Layout

MAX_STRETCH_PAGES = 1 << 18
MAX_RUNS = 256


class PushRequest(NamedTuple):
    """One request on the push lane: runs of (first, pages), and the bytes granted for them."""

    runs: tuple[tuple[int, int], ...]
    credit: int
    sent: float


class PushOrder:
    """A cursor that walks the missing pages and jumps with the guest's faults.

    Where memory turns out to be holes a request may stretch over more pages than its credit would pay for, since zero
    pages cost none; where it is full the stretch falls back to one.
    """

    def __init__(self, layout: Layout, settled: PageSet) -> None:
        self._layout = layout
        self._settled = settled
        self._under_way = PageSet(layout.page_count)
        self._cursor = 0
        self._stretch = 1

    def is_under_way(self, page: int) -> bool:
        """Say whether a request covers the page."""
        return page in self._under_way

    def free(self, first: int, pages: int) -> Iterator[tuple[int, int]]:
        """Yield the runs inside the run that no request covers, as (first, pages)."""
        return self._under_way.absent_runs(first, pages)

    def follow(self, page: int) -> None:
        """Go on from this page."""
        self._cursor = page if page < self._layout.page_count else 0

    def answered(self, request: PushRequest, used: int) -> None:
        """A request was answered for good; `used` is its raw bytes, which tell how densely the memory is filled."""
        for first, pages in request.runs:
            self._under_way.remove(first, pages)
        if 4 * used < request.credit:
            self._stretch = min(self._stretch * 4, MAX_STRETCH_PAGES)
        elif used + PAGE_SIZE > request.credit:
            self._stretch = 1

    def lost(self) -> None:
        """The lane is gone, and what was under way with it."""
        self._under_way = PageSet(self._layout.page_count)

    def next(self, credit: int, now: float) -> PushRequest | None:
        """Return the next request within `credit` bytes, or None when every missing page is under way."""
        left = min(credit // PAGE_SIZE * self._stretch, MAX_STRETCH_PAGES)
        runs: list[tuple[int, int]] = []
        wrapped = False
        while left > 0 and len(runs) < MAX_RUNS:
            run = self._next_run(self._cursor, left)
            if run is None:
                # One turn around the memory finds everything.
                if wrapped or not self._cursor:
                    break
                wrapped, self._cursor = True, 0
                continue
            self._under_way.add(*run)
            runs.append(run)
            self._cursor = run[0] + run[1]
            left -= run[1]
        if not runs:
            return None
        # Whole granules may exceed what was granted: they cannot be installed in part.
        needed = sum(pages for _, pages in runs) * PAGE_SIZE
        return PushRequest(tuple(runs), needed if left < 0 else min(credit, needed), now)

    def _next_run(self, first: int, limit: int) -> tuple[int, int] | None:
        """Return the first free run from `first` on, at most `limit` pages or one granule."""
        stop = self._layout.page_count
        while first < stop and (page := self._settled.next_absent(first, stop)) < stop:
            if page in self._under_way:
                first = self._under_way.next_absent(page, stop)
                continue
            if not self._layout.uniform:
                start, granule = self._layout.granule(page)
                if granule > 1:
                    return start, granule
                index = self._layout.region_of(page)
                stop = self._layout.starts[index] + self._layout.regions[index].size // PAGE_SIZE
            end = self._settled.next_present(page, min(stop, page + limit))
            return page, self._under_way.next_present(page, end) - page
        return None
