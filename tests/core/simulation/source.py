"""The source: what its memory holds, and how it answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.core.requests import MAX_CREDIT, MAX_FETCH_PAGES, MAX_PUSH_RUNS
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

from .clock import Violation

Content = int
"""What a page holds: 0 is zeroes, else the page's number at the source plus one, or a number that the guest wrote."""
ZEROES: Content = 0
POISON: Content = -1


class Message(NamedTuple):
    """Pages on a lane: the contents stand for the bytes of the raw runs."""

    runs: list[Run]
    contents: list[Content]
    last: bool = False


class Source:
    """Memory that stands still, and is kept until Complete."""

    def __init__(self, rng: random.Random, layout: Layout, dense: float, poison: float) -> None:
        self._rng = rng
        self._layout = layout
        self.kinds = self._fill(dense, poison)
        self.released = False

    def _fill(self, dense: float, poison: float) -> list[int]:
        """Memory comes in stretches of a kind, as a guest's does; a page is poisoned with all of its granule."""
        rng = self._rng
        kinds: list[int] = []
        while len(kinds) < self._layout.page_count:
            kind = RAW if rng.random() < dense else ZERO
            kinds += [kind] * rng.choice((1, 2, 5, 20))
        del kinds[self._layout.page_count :]
        for page in range(self._layout.page_count):
            if rng.random() < poison:
                first, pages = self._layout.granule(page)
                kinds[first : first + pages] = [POISONED] * pages
        return kinds

    def content(self, page: int) -> Content:
        kind = self.kinds[page]
        return page + 1 if kind == RAW else POISON if kind == POISONED else ZEROES

    def fetch(self, runs: tuple[tuple[int, int], ...]) -> Message:
        """Answer a demand request, whole and in order."""
        self._check(runs)
        if sum(pages for _, pages in runs) > MAX_FETCH_PAGES:
            raise Violation(f"a demand request for too many pages: {runs}")
        asked = [page for first, pages in runs for page in range(first, first + pages)]
        return self._message(asked, {first for first, _ in runs})

    def push(self, runs: tuple[tuple[int, int], ...], credit: int) -> Iterator[Message]:
        """Answer a push request until its credit is spent, in messages of a few pages."""
        self._check(runs)
        if len(runs) > MAX_PUSH_RUNS or not PAGE_SIZE <= credit <= MAX_CREDIT or credit % PAGE_SIZE:
            raise Violation(f"a push request of {len(runs)} runs and {credit} bytes")
        pages = self._within_credit(runs, credit // PAGE_SIZE)
        starts = {first for first, _ in runs}
        size = self._rng.choice((1, 4, 16, 64))
        cuts = list(range(0, len(pages), size))
        ends_alone = self._rng.random() < 0.2
        for at in cuts:
            yield self._message(pages[at : at + size], starts, last=at == cuts[-1] and not ends_alone)
        if ends_alone:
            yield Message([], [], last=True)

    def _within_credit(self, runs: tuple[tuple[int, int], ...], credit: int) -> list[int]:
        pages: list[int] = []
        for first, count in runs:
            for page in range(first, first + count):
                if self.kinds[page] == RAW:
                    if not credit:
                        return pages
                    credit -= 1
                pages.append(page)
        return pages

    def _check(self, runs: tuple[tuple[int, int], ...]) -> None:
        for first, pages in runs:
            self._layout.check(first, pages)

    def _message(self, pages: list[int], starts: set[int], *, last: bool = False) -> Message:
        """Group pages into runs of one kind, none across what was asked for as two; now and then one is cut further."""
        runs: list[Run] = []
        contents: list[Content] = []
        kinds, split = self.kinds, self._rng.random() < 0.2
        for page in pages:
            kind = kinds[page]
            if kind == RAW:
                contents.append(page + 1)
            before = runs[-1] if runs else None
            if (
                before is None
                or (before.first + before.pages, before.kind) != (page, kind)
                or page in starts
                or (split and self._rng.random() < 0.3)
            ):
                runs.append(Run(page, 1, kind))
            else:
                runs[-1] = Run(before.first, before.pages + 1, kind)
        return Message(runs, contents, last)

    def complete(self, pages: int) -> None:
        if pages != self._layout.page_count:
            raise Violation(f"Complete speaks of {pages} pages")
        self.released = True
