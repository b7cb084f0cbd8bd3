"""A source whose pages take a random number of turns to come, some of them private."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable

from queue_lanes import QueueLanes, QueueSource

from pageferryd.core.layout import Layout


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

    def cut(self) -> None:
        """Cut the latest connection."""
        if self.connections:
            self.connections[-1].cut()
