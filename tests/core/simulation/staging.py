"""Granules in the making: pages that can only be installed together wait here for one another."""

from __future__ import annotations

from collections.abc import Iterator

from pageferryd.core.layout import Layout
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

from .source import POISON, Content


class Staging:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._held: dict[int, dict[int, Content]] = {}
        self.most_held = 0

    def add(self, run: Run, contents: list[Content]) -> Iterator[tuple[Run, list[Content]]]:
        """Take pages; yield the granules that they complete."""
        for page, content in enumerate(contents, run.first):
            first, pages = self._layout.granule(page)
            held = self._held.setdefault(first, {})
            self.most_held = max(self.most_held, len(self._held))
            held[page] = content
            if len(held) == pages:
                del self._held[first]
                whole = [held[at] for at in range(first, first + pages)]
                kind = POISONED if POISON in whole else RAW if any(whole) else ZERO
                yield Run(first, pages, kind), whole

    def drop(self, first: int, pages: int) -> None:
        for granule in [granule for granule in self._held if first <= granule < first + pages]:
            del self._held[granule]
