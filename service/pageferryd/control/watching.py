"""Following a migration until it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pageferry.v1 import migration_pb2
    from pageferryd.control.book import Mover

INTERVAL_SECONDS = 0.25


async def watch(mover: Mover) -> AsyncIterator[migration_pb2.Migration]:
    """Yield the migration at once, after each change, and a few times a second; last when it has ended."""
    while True:
        ended = mover.record.state.final
        yield mover.view()
        if ended:
            return
        await mover.record.changes.wait(INTERVAL_SECONDS)
