"""A coarse picture of which pages have come, and by which lane."""

from __future__ import annotations

from pageferryd.core.pager import Lane

MAX_CELLS = 512


class ArrivalMap:
    """At most 512 cells of equally many pages; each counts what came to it by demand and by push."""

    def __init__(self, page_count: int) -> None:
        self.pages_per_cell = -(-page_count // MAX_CELLS)
        cells = -(-page_count // self.pages_per_cell)
        self.demand = [0] * cells
        self.push = [0] * cells

    def note(self, first: int, pages: int, lane: Lane) -> None:
        """Count a run that was installed."""
        cells = self.demand if lane is Lane.DEMAND else self.push
        size = self.pages_per_cell
        while pages:
            cell, into = divmod(first, size)
            take = min(pages, size - into)
            cells[cell] += take
            first += take
            pages -= take
