"""Following a migration: a picture that moves on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from rich.live import Live

from pageferry.cli import progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from rich.console import Console

    from pageferry.v1 import migration_pb2 as pb

LINE_SECONDS: Final = 1.0
_FRAMES_PER_SECOND: Final = 10


class PlainLines:
    """Says which looks at a migration are worth a line: each change of state or place, each second, and the last."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._next = 0.0

    def line(self, migration: pb.Migration, now: float) -> str | None:
        """Return the line for a look at time `now`, in seconds, or None."""
        at = (migration.state, migration.queue_position)
        if at == self._last and now < self._next:
            return None
        self._last = at
        self._next = now + LINE_SECONDS
        return progress.line(migration)


async def follow(looks: AsyncIterator[pb.Migration], out: Console) -> pb.Migration:
    """Show each look until they end, and return the last. They must be at least one."""
    if out.is_terminal:
        return await _follow_live(looks, out)
    lines = PlainLines()
    async for look in looks:
        text = lines.line(look, time.monotonic())
        if text is not None:
            out.print(text, markup=False, soft_wrap=True)
    return look


async def _follow_live(looks: AsyncIterator[pb.Migration], out: Console) -> pb.Migration:
    with Live(console=out, refresh_per_second=_FRAMES_PER_SECOND, redirect_stdout=False, redirect_stderr=False) as live:
        async for look in looks:
            live.update(progress.panel(look, colours=not out.no_color, width=out.width))
    return look


async def last(looks: AsyncGenerator[pb.Migration]) -> pb.Migration:
    """Return the last look, showing nothing."""
    async with aclosing(looks):
        return [look async for look in looks][-1]
