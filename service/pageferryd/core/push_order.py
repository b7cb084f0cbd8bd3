"""Push order: which missing runs come next. It goes on behind the latest fault, since a guest has locality."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.page_set import PageSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.core.layout import Layout

MAX_STRETCH_PAGES = 1 << 18
MAX_RUNS = 256


class PushRequest(NamedTuple):
    """One request on the push lane: runs of (first, pages), the bytes granted for them, and where the order stood."""

    runs: tuple[tuple[int, int], ...]
    credit: int
    sent: float
    turn: int = 0


class PushOrder:
    """A cursor that walks the missing pages and jumps with the guest's faults.

    Where memory turns out to be holes a request may stretch over more pages than its credit would pay for, since zero
    pages cost none; where it is full the stretch falls back to one. A page that can only be installed as part of a
    granule brings the rest of it with it before the cursor jumps, so that few granules are ever half here.
    """

    def __init__(self, layout: Layout, settled: PageSet) -> None:
        self._layout = layout
        self._settled = settled
        # Asked for and not settled yet, so no page is in both sets.
        self._under_way = PageSet(layout.page_count)
        self._cursor = 0
        self._turn = 0
        self._stretch = 1
        # Granules that were asked for in part, as (first, stop). Each request in flight adds one at most.
        self._begun: deque[tuple[int, int]] = deque()

    def is_under_way(self, page: int) -> bool:
        """Say whether the page was asked for, and has neither come to be installed nor been refused."""
        return page in self._under_way

    def free(self, first: int, pages: int) -> Iterator[tuple[int, int]]:
        """Yield the runs inside the run that are not under way, as (first, pages)."""
        return self._under_way.absent_runs(first, pages)

    def follow(self, page: int) -> None:
        """Go on from this page."""
        self._cursor = page if page < self._layout.page_count else 0
        self._turn += 1

    def settled(self, first: int, pages: int) -> None:
        """Pages need no fetching any more."""
        self._under_way.remove(first, pages)

    def answered(self, request: PushRequest, used: int, rest: list[tuple[int, int]]) -> None:
        """A request was answered for good, all but the `rest` of it.

        `used` is its raw bytes, which tell how densely the memory is filled.
        """
        for first, pages in rest:
            self._under_way.remove(first, pages)
        if rest:
            self._go_back(rest[0][0], request.turn)
        if 4 * used < request.credit:
            self._stretch = min(self._stretch * 4, MAX_STRETCH_PAGES)
        elif used + PAGE_SIZE > request.credit:
            self._stretch = 1

    def _go_back(self, page: int, turn: int) -> None:
        """Go on from a page that was asked for in vain, unless a younger fault has moved the cursor."""
        first, pages = self._layout.granule(page)
        if first < page:
            self._begun.append((page, first + pages))
        if turn == self._turn:
            self.follow(page)

    def lost(self) -> None:
        """The lane is gone, and what was under way with it."""
        self._under_way = PageSet(self._layout.page_count)
        self._begun.clear()

    def next(self, credit: int, now: float) -> PushRequest | None:
        """Return the next request within `credit` bytes, or None when every missing page is under way."""
        left = min(credit // PAGE_SIZE * self._stretch, MAX_STRETCH_PAGES)
        runs: list[tuple[int, int]] = []
        pages = 0
        while pages < left and len(runs) < MAX_RUNS:
            run = self._next_run(left - pages)
            if run is None:
                break
            self._under_way.add(*run)
            if runs and sum(runs[-1]) == run[0]:
                runs[-1] = (runs[-1][0], runs[-1][1] + run[1])
            else:
                runs.append(run)
            pages += run[1]
        if not runs:
            return None
        return PushRequest(tuple(runs), min(credit, pages * PAGE_SIZE), now, self._turn)

    def _next_run(self, limit: int) -> tuple[int, int] | None:
        """Return the next free run, of at most `limit` pages: of begun granules, behind the cursor, before it."""
        while self._begun:
            run = self._free_run(*self._begun[0], limit)
            if run is not None:
                return run
            self._begun.popleft()
        run = self._free_run(self._cursor, self._layout.page_count, limit) or self._free_run(0, self._cursor, limit)
        if run is not None:
            self._cursor = run[0] + run[1]
            if run[1] == limit and not self._layout.uniform:
                self._note_begun(self._cursor)
        return run

    def _note_begun(self, stop: int) -> None:
        """Remember the granule that a request asks for in part, up to `stop`."""
        first, pages = self._layout.granule(stop - 1)
        if stop < first + pages:
            self._begun.append((stop, first + pages))

    def _free_run(self, first: int, stop: int, limit: int) -> tuple[int, int] | None:
        while (page := self._settled.next_absent(first, stop)) < stop:
            first = self._under_way.next_absent(page, stop)
            if first == page:
                end = self._settled.next_present(page, min(stop, page + limit))
                return page, self._under_way.next_present(page, end) - page
        return None
