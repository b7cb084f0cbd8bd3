"""The page map: where each page of a guest stands at the destination."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from pageferryd.core.page_set import PageSet

if TYPE_CHECKING:
    from collections.abc import Iterator


class PageState(Enum):
    """Where a page stands. A missing page that was asked for is requested; the pager keeps those."""

    MISSING = "missing"
    REQUESTED = "requested"
    PRESENT = "present"
    DISCARDED = "discarded"
    """The guest gave the page away: it is zero from then on, and never fetched."""
    POISONED = "poisoned"
    """The source could not read the page: an access fails like a memory error."""


class PageMap:
    """Bitmaps of the pages that are settled, and of those settled otherwise than by their bytes.

    Settled is one bit a page, 32 KiB a GiB. Discarded and poisoned cost nothing until they happen.
    """

    __slots__ = ("discarded", "page_count", "poisoned", "settled")

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self.settled = PageSet(page_count)
        """Present, discarded or poisoned: nothing is left to fetch."""
        self.discarded = PageSet(page_count)
        self.poisoned = PageSet(page_count)

    def state(self, page: int) -> PageState:
        """Return the page's state; a requested page shows as missing here."""
        if page not in self.settled:
            return PageState.MISSING
        if page in self.discarded:
            return PageState.DISCARDED
        return PageState.POISONED if page in self.poisoned else PageState.PRESENT

    def settle(self, first: int, pages: int) -> int:
        """Mark a run present; return how many of its pages were missing."""
        return self.settled.add(first, pages)

    def poison(self, first: int, pages: int) -> None:
        """Mark the missing pages of a run poisoned."""
        for start, length in list(self.settled.absent_runs(first, pages)):
            self.settled.add(start, length)
            self.poisoned.add(start, length)

    def discard(self, first: int, pages: int) -> None:
        """Mark a run discarded, whatever it was."""
        self.settled.add(first, pages)
        self.poisoned.remove(first, pages)
        self.discarded.add(first, pages)

    def missing_runs(self, first: int, pages: int) -> Iterator[tuple[int, int]]:
        """Yield the runs still to be fetched, as (first, pages)."""
        return self.settled.absent_runs(first, pages)

    @property
    def missing(self) -> int:
        """How many pages are still to be fetched."""
        return self.page_count - self.settled.count
