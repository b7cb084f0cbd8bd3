"""Opaque pages: those that only the source's VMM can export are asked for once more, in bundles of its making."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from pageferry.errors import FerryError, Reason
from pageferryd.core.page_set import PageSet

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from pageferry.v1 import page_pb2
    from pageferryd.destination.lanes import Lanes

MAX_PAGES = 256
"""Pages in one request: what a fault may have to wait behind, where the VMM exports one after the other."""
MAX_BUNDLE_PAGES = 512
MAX_PAYLOAD = 4 << 20
MAX_METADATA = 1 << 20


class HasRoom(Protocol):
    """Whether the VMM may be given so many pages more; there is more room for urgent ones."""

    def __call__(self, pages: int, *, urgent: bool = False) -> bool:
        """Answer."""


class Exports:
    """Pages to be asked for, the urgent ones first; `deliver` takes each bundle for which there is room.

    Memory is bounded by one bit a page, the pages that the guest waits for, and one answer a worker.
    """

    def __init__(self, page_count: int, deliver: Callable[[page_pb2.PageBundle], None], has_room: HasRoom) -> None:
        self._deliver = deliver
        self._has_room = has_room
        self._page_count = page_count
        self._wanted = PageSet(page_count)
        # In the order of their faults; all of them are wanted as well.
        self._urgent: dict[int, None] = {}
        # Pages under way, and whether the guest waits for them.
        self._asked: dict[int, bool] = {}
        self._cursor = 0
        self._most = MAX_PAGES
        self._changed = asyncio.Event()

    def add(self, page: int, *, urgent: bool) -> None:
        """Ask for an opaque page, unless it is on its way."""
        if page in self._asked:
            self._asked[page] |= urgent
        else:
            self._wanted.add(page, 1)
            if urgent:
                self._urgent[page] = None
        self._changed.set()

    def drop(self, first: int, pages: int) -> None:
        """The guest converted pages, or gave them away."""
        self._wanted.remove(first, pages)
        for page in [page for page in self._urgent if first <= page < first + pages]:
            del self._urgent[page]
        self._changed.set()

    def lost(self) -> None:
        """The lanes are gone: the pages are asked for anew, and come here again."""
        self._wanted = PageSet(self._page_count)
        self._urgent.clear()
        self._asked.clear()

    def wake(self) -> None:
        """There may be room, or the guest runs."""
        self._changed.set()

    def workers(self, lanes: Lanes, guest_runs: Callable[[], bool]) -> list[Coroutine[None, None, None]]:
        """Return what asks and delivers until it is cancelled.

        Until the guest runs one worker keeps the bundles in order. From then on another is there for what the guest
        waits for. Two that ask for the rest would often get the same bundles.
        """
        return [self._work(lanes, lambda: True), self._work(lanes, guest_runs, bulk=False)]

    async def _work(self, lanes: Lanes, may_ask: Callable[[], bool], *, bulk: bool = True) -> None:
        while True:
            pages = self._next(bulk=bulk) if may_ask() else []
            if not pages:
                await self._change()
                continue
            for bundle in await self._export(lanes, pages):
                while not self._has_room(len(bundle.pages), urgent=any(self._asked[page] for page in pages)):
                    await self._change()
                for page in bundle.pages:
                    self._forget(page)
                self._deliver(bundle)
            for page in pages:
                del self._asked[page]

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _export(self, lanes: Lanes, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        try:
            bundles = await lanes.export(pages)
        except FerryError:
            # Fewer may fit where so many were too large, or took too long.
            self._most = max(1, self._most // 4)
            raise
        self._most = min(2 * self._most, MAX_PAGES)
        for bundle in bundles:
            _check(bundle, self._page_count)
        lacking = set(pages).difference(*(bundle.pages for bundle in bundles))
        if lacking:
            raise FerryError(Reason.MALFORMED_PAGES, f"the source did not export page {min(lacking)}, as it was asked")
        return bundles

    def _next(self, *, bulk: bool) -> list[int]:
        """Take the pages of the next request."""
        pages: list[int] = []
        urgent = bool(self._urgent) and self._has_room(1, urgent=True)
        if urgent:
            pages = list(islice(self._urgent, self._most))
        elif bulk and self._has_room(1):
            pages = self._next_bulk()
        for page in pages:
            self._forget(page)
            self._cursor = page + 1
        self._asked.update(dict.fromkeys(pages, urgent))
        return pages

    def _next_bulk(self) -> list[int]:
        """Return wanted pages: a guest has locality, so those behind what was asked for last."""
        pages: list[int] = []
        for first, stop in ((self._cursor, self._page_count), (0, self._cursor)):
            page = first
            while len(pages) < self._most and (page := self._wanted.next_present(page, stop)) < stop:
                pages.append(page)
                page += 1
        return pages

    def _forget(self, page: int) -> None:
        self._wanted.remove(page, 1)
        self._urgent.pop(page, None)


def _check(bundle: page_pb2.PageBundle, page_count: int) -> None:
    pages = len(bundle.pages)
    if (
        not 0 < pages <= MAX_BUNDLE_PAGES
        or len(set(bundle.pages)) < pages
        or max(bundle.pages) >= page_count
        or len(bundle.payload) > MAX_PAYLOAD
        or len(bundle.metadata) > MAX_METADATA
    ):
        raise FerryError(
            Reason.MALFORMED_PAGES,
            f"the source sent an impossible bundle of {pages} pages, {len(bundle.payload)} and "
            f"{len(bundle.metadata)} bytes",
        )
