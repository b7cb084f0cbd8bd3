"""Opaque pages: those that only the source's VMM can export are asked for once more, in bundles of its making."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.page_set import PageSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferry.v1 import page_pb2
    from pageferryd.destination.lanes import Lanes

_log = structlog.get_logger(__name__)

WORKERS = 2
MAX_PAGES = 64
"""Pages in one request that nobody waits for: what a fault may have to wait behind."""
MAX_BUNDLE_PAGES = 512
_PAUSE_SECONDS = 0.2


class Exports:
    """Pages to be asked for, the urgent ones first; `deliver` takes each bundle that comes.

    Memory is bounded by one bit a page, and by the pages that the guest waits for.
    """

    def __init__(self, page_count: int, deliver: Callable[[page_pb2.PageBundle], None]) -> None:
        self._deliver = deliver
        self._page_count = page_count
        self._wanted = PageSet(page_count)
        self._urgent: deque[int] = deque()
        self._work = asyncio.Event()

    def add(self, first: int, pages: int, *, urgent: bool) -> None:
        """Ask for opaque pages."""
        if urgent:
            self._urgent.extend(page for page in range(first, first + pages) if page not in self._wanted)
        self._wanted.add(first, pages)
        self._work.set()

    def drop(self, first: int, pages: int) -> None:
        """The guest converted pages, or gave them away."""
        self._wanted.remove(first, pages)

    def lost(self) -> None:
        """The lanes are gone: the pages are asked for anew, and come here again."""
        self._wanted = PageSet(self._page_count)
        self._urgent.clear()

    async def work(self, lanes: Lanes, has_room: Callable[[], bool]) -> None:
        """Ask and deliver, until cancelled; waits while the VMM is behind with its imports (`has_room`)."""
        while True:
            pages = self._next() if has_room() else []
            if not pages:
                self._work.clear()
                # Imports that are reported make room without a word to this task.
                try:
                    async with asyncio.timeout(None if has_room() else _PAUSE_SECONDS):
                        await self._work.wait()
                except TimeoutError:
                    pass
                continue
            for bundle in await lanes.export(pages):
                _check(bundle, self._page_count)
                self._deliver(bundle)

    def _next(self) -> list[int]:
        """Take the pages of the next request."""
        pages: list[int] = []
        while self._urgent and len(pages) < MAX_PAGES:
            page = self._urgent.popleft()
            if page in self._wanted:
                pages.append(page)
        page = 0
        while not pages or (not self._urgent and len(pages) < MAX_PAGES):
            page = self._wanted.next_present(page, self._page_count)
            if page >= self._page_count:
                break
            if page not in pages:
                pages.append(page)
            page += 1
        for page in pages:
            self._wanted.remove(page, 1)
        return pages


def _check(bundle: page_pb2.PageBundle, page_count: int) -> None:
    if not 0 < len(bundle.pages) <= MAX_BUNDLE_PAGES or any(page >= page_count for page in bundle.pages):
        raise FerryError(Reason.MALFORMED_PAGES, f"the source sent an impossible bundle of {len(bundle.pages)} pages")
