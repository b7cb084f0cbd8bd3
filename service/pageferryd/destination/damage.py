"""Pages that came damaged, by their checksums: counted and fetched again; a connection that brings many is given up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.checksums import damaged_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    from pageferryd.core.pager import Pager

MOST_IN_A_ROW = 8
"""Damaged pages without a good one in between, or damage of one page, that end a connection."""
MOST_AT_ONCE = 1024
"""Damaged pages of which no good copy has come yet that end one."""

_log = structlog.get_logger(__name__)


class Damage:
    """What of one guest's pages came damaged."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self.mismatches = 0
        """Pages that came damaged; one that did so twice counts twice."""
        self._in_a_row = 0
        self._times: dict[int, int] = {}
        self._broken = ""
        self._happened = asyncio.Event()

    def watch(self, missing_again: Callable[[], None]) -> Coroutine[Any, Any, None]:
        """Begin with a new connection; returns what has to run for as long as that lives.

        It calls `missing_again` after damage, since there is something to ask for, and raises
        FerryError(PAGES_DAMAGED) once the connection brings too much of it.
        """
        self._in_a_row, self._broken = 0, ""
        self._times.clear()
        self._happened.clear()
        return self._watch(missing_again)

    async def _watch(self, missing_again: Callable[[], None]) -> None:
        while True:
            await self._happened.wait()
            self._happened.clear()
            if self._broken:
                raise FerryError(
                    Reason.PAGES_DAMAGED,
                    f"{self._broken}; none of it was put in place. Look for faulty memory, network cards or proxies "
                    "on the way between the hosts",
                )
            missing_again()

    def damaged_in(
        self, first: int, pages: int, data: bytes | bytearray, offset: int, checksums: bytes | bytearray, at: int
    ) -> list[int]:
        """Look at pages that came; return the damaged ones, by number. These count as missing again.

        The pages lie in `data` from `offset` on, and their checksums in `checksums` from `at` on.
        """
        damaged = [first + index for index in damaged_pages(data, offset, pages, checksums, at)]
        if not damaged and not self._times:
            self._in_a_row = 0
            return damaged
        members = set(damaged)
        for page in range(first, first + pages):
            if page in members:
                self._note(page)
            else:
                self._in_a_row = 0
                self._times.pop(page, None)
        return damaged

    def intact_in(self, first: int, pages: int, data: bytes, offset: int, checksums: int) -> Iterator[tuple[int, int]]:
        """Look at pages as `damaged_in` does, with their checksums in `data`; yield the runs of good ones."""
        start = first
        for page in self.damaged_in(first, pages, data, offset, data, checksums):
            if page > start:
                yield start, page - start
            start = page + 1
        if start < first + pages:
            yield start, first + pages - start

    def _note(self, page: int) -> None:
        self.mismatches += 1
        self._in_a_row += 1
        times = self._times[page] = self._times.get(page, 0) + 1
        if self._in_a_row >= MOST_IN_A_ROW:
            self._broken = f"{self._in_a_row} pages in a row came damaged, the last of them page {page}"
        elif times >= MOST_IN_A_ROW:
            self._broken = f"page {page} came damaged {times} times"
        elif len(self._times) >= MOST_AT_ONCE:
            self._broken = f"{len(self._times)} pages came damaged, and no good copies of them"
        else:
            _log.warning("page_damaged", page=page, times=times)
        self._pager.not_installed(page, 1)
        self._happened.set()
