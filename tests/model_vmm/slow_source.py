"""A source whose pages take a random number of turns to come, some of them private."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Iterable
from typing import Any

from queue_lanes import QueueLanes, QueueSource

from pageferryd.core.layout import PAGE_SIZE, Layout


class TornReader:
    """Reads up to the first page that cannot be read."""

    def __init__(self, reader: Any, torn: set[int]) -> None:
        self._reader = reader
        self._torn = torn

    def read(self, at: int, length: int) -> bytes:
        first = min((address for address in self._torn if at <= address < at + length), default=at + length)
        if first == at:
            raise OSError(errno.EIO, "the test has torn this page out")
        return self._reader.read(at, first - at)

    def extents(self, at: int, length: int) -> Any:
        return self._reader.extents(at, length)


class SlowLanes(QueueLanes):
    def __init__(self, source: SlowSource) -> None:
        super().__init__(source)
        self._rng = source.rng
        self._slowest = source.slowest

    async def fetched(self) -> bytes:
        return await self._late(await super().fetched())

    async def pushed(self) -> bytes:
        return await self._late(await super().pushed())

    async def _late(self, message: bytes) -> bytes:
        for _ in range(self._rng.randrange(self._slowest)):
            await asyncio.sleep(0)
        return message


class SlowSource(QueueSource):
    def __init__(
        self,
        layout: Layout,
        fill: Callable[[int], bytes | None],
        private: Iterable[int],
        rng: random.Random,
        slowest: int,
    ) -> None:
        super().__init__(layout, fill)
        self.served.open((page, 1) for page in private)
        self.rng = rng
        self.slowest = slowest

    async def open(self) -> QueueLanes:
        self.attempted.set()
        self.connections.append(SlowLanes(self))
        return self.connections[-1]

    def tear_out(self, pages: Iterable[int]) -> None:
        """Make pages unreadable."""
        torn = set()
        for page in pages:
            piece = next(self.layout.pieces(page, 1))
            torn.add(self._memories[piece.region].address + piece.first * PAGE_SIZE)
        regions = self.served.readable()._regions
        regions[:] = [region._replace(reader=TornReader(region.reader, torn)) for region in regions]

    def cut(self) -> None:
        """Cut the latest connection."""
        if self.connections:
            self.connections[-1].cut()
