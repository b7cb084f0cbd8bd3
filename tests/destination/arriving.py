"""A guest that arrives in this process: a session between guarded memory and a source behind queues."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from guarded import DEADLINE, Guarded, content
from queue_lanes import QueueSource

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.destination.session import Session, SessionOptions
from pageferryd.destination.uffd_door import UffdDoor
from pageferryd.destination.uffd_installer import UffdInstaller

T = TypeVar("T")
ZERO_PAGE = bytes(PAGE_SIZE)


def at_source(page: int) -> bytes | None:
    """What the source holds: every fifth page is a hole, every seventh of the rest full of zeroes."""
    if page % 5 == 4:
        return None
    return ZERO_PAGE if page % 7 == 6 else content(page)


def expected(page: int) -> bytes:
    return at_source(page) or ZERO_PAGE


class Arriving:
    """The guest; `paused` has what the session told of its lanes, in order."""

    def __init__(
        self, guarded: Guarded, *, silence: float = DEADLINE, push: bool = True, checksums: bool = False
    ) -> None:
        self.guarded = guarded
        self.layout = guarded.layout
        self.source = QueueSource(guarded.layout, at_source, checksums=checksums)
        self.paused: list[Reason | None] = []
        self._changed = asyncio.Event()
        pager = PagerOptions(silence=silence, fault_around=0, pacing=PacingOptions(disabled=not push))
        self.session = Session(
            guarded.layout,
            [UffdDoor(guarded.uffd, guarded.addresses)],
            UffdInstaller(guarded.uffd, guarded.addresses),
            self.source,
            SessionOptions(pager, backoff_initial=0.001, backoff_max=0.01),
            self._note,
        )
        self.running: asyncio.Task[None] | None = None

    def start(self, *, push: bool = True) -> None:
        """Open the doors and run; `push` as when the guest runs."""
        self.session.open_doors()
        self.running = asyncio.create_task(self.session.run())
        if push:
            self.session.start_push()

    async def done(self) -> None:
        assert self.running is not None
        await asyncio.wait_for(asyncio.shield(self.running), DEADLINE)

    async def failed(self) -> Reason:
        try:
            await self.done()
        except FerryError as error:
            return error.reason
        raise AssertionError("the session ended without an error")

    async def until_paused(self, reason: Reason | None) -> None:
        async with asyncio.timeout(DEADLINE):
            while reason not in self.paused:
                self._changed.clear()
                await self._changed.wait()

    async def read(self, page: int) -> bytes:
        return await of(self.guarded.reading(page))

    async def check_all(self) -> None:
        """Let the memory go as a finished migration does, and look at every page."""
        await self.session.close()
        UffdInstaller(self.guarded.uffd, self.guarded.addresses).release()
        memory = self.guarded.read_all()
        wrong = [
            page
            for page in range(self.layout.page_count)
            if memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != expected(page)
        ]
        assert wrong == []

    async def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        await self.session.close()
        # Whoever still waits is let go before the memory is.
        self.guarded.uffd.close()
        self.source.close()

    def _note(self, error: FerryError | None) -> None:
        self.paused.append(None if error is None else error.reason)
        self._changed.set()


async def of(future: Future[T]) -> T:
    return await asyncio.wait_for(asyncio.wrap_future(future), DEADLINE)
