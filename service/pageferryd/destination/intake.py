"""Faults on their way in: from the doors to the pager, and its answers to the placer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pageferryd.core.pager import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pageferryd.core.demand import FaultTimes
    from pageferryd.core.layout import Layout
    from pageferryd.core.pager import Pager
    from pageferryd.destination.door import DoorEvents
    from pageferryd.destination.placer import Placer

SHARED_DOOR = "uffd"
"""The door that sees accesses to shared memory alone: a userfaultfd guards a mapping, and private pages have none."""

CLASSES = {
    Answer.FETCH: "missing",
    Answer.JOINED: "joined",
    Answer.ZERO: "zero",
    Answer.WAKE: "present",
    Answer.POISON: "poisoned",
}
"""What a fault's answer is called in metrics."""


class FaultIntake:
    """Takes what a door delivers. `work` is called when requests may be due."""

    def __init__(
        self,
        pager: Pager,
        placer: Placer,
        ended: Callable[[list[FaultTimes]], None],
        work: Callable[[], None],
        clock: Callable[[], float],
        note_discard: Callable[[int, int], None] = lambda _first, _pages: None,
    ) -> None:
        self._pager = pager
        self._placer = placer
        self._ended = ended
        self._work = work
        self._clock = clock
        self._note_discard = note_discard
        self.counts: Counter[tuple[str, str]] = Counter()
        """Faults by door and class."""

    def take(self, door: str, events: DoorEvents) -> None:
        """Take what a door saw at once: discards first, since any of the faults may be younger."""
        now = self._clock()
        for first, pages in events.discards:
            self.discard(first, pages, now)
        shared_only = door == SHARED_DOOR
        for page in events.faults:
            if shared_only:
                answer = self._placer.touched(page, now, events.seen)
            else:
                answer = self._pager.fault(page, now, events.seen)
                self._placer.carry_out(answer, page)
            self.counts[door, CLASSES[answer]] += 1
        self._work()

    def discard(self, first: int, pages: int, now: float) -> None:
        """The guest gave pages away, or converts them: whatever is under way of them is dropped, and they are zero."""
        self._note_discard(first, pages)
        self._discard(first, pages, now)

    def restore(self, first: int, pages: int) -> None:
        """The guest gave pages away under an earlier sidecar."""
        self._discard(first, pages, self._clock())

    def _discard(self, first: int, pages: int, now: float) -> None:
        for start, length, whole in whole_granules(self._pager.layout, first, pages):
            if whole:
                self._discard_whole(start, length, now)
            else:
                self._discard_part(start, length)

    def _discard_part(self, first: int, pages: int) -> None:
        waited_for = self._placer.partly_dropped(first, pages)
        for times in waited_for:
            self._placer.serve_zero(times.page)
        if waited_for:
            self._ended(waited_for)

    def _discard_whole(self, first: int, pages: int, now: float) -> None:
        self._placer.dropped(first, pages)
        cured = self._poisoned(first, pages) if self._pager.map.poisoned else []
        waited_for = self._pager.discard(first, pages, now)
        for page in cured:
            # Or an access to it would still fail, or exit for ever once nobody answers any more.
            self._placer.serve_zero(page)
        for times in waited_for:
            self._placer.serve_zero(times.page)
        if waited_for:
            self._ended(waited_for)

    def _poisoned(self, first: int, pages: int) -> list[int]:
        """Return the poisoned pages of whole granules; one stands for a granule, which was poisoned whole."""
        step, found = self._pager.layout.granule(first)[1], self._pager.map.poisoned
        each = [(found.next_present(start, start + step), start + step) for start in range(first, first + pages, step)]
        return [page for page, stop in each if page < stop]


def whole_granules(layout: Layout, first: int, pages: int) -> Iterator[tuple[int, int, bool]]:
    """Cut a run where it leaves whole granules; yields (first, pages, whether they are whole granules)."""
    if layout.uniform:
        yield first, pages, True
        return
    stop = first + pages
    while first < stop:
        start, size = layout.granule(first)
        if size == 1:
            end = min(stop, layout.end_of_region(first))
            yield first, end - first, True
        else:
            end = min(stop, start + size)
            yield first, end - first, end - first == size
        first = end
