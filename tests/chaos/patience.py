"""Waiting for processes of which many are started and asked at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from child import Child, Event

PATIENCE = 30.0
Made = TypeVar("Made", bound=Child)


class Patient(Child):
    """A process that may take long for an answer."""

    def wait_event(
        self,
        name: str,
        since: int = 0,
        where: Callable[[Event], bool] = lambda _event: True,
        seconds: float = PATIENCE,
    ) -> Event:
        return super().wait_event(name, since, where, seconds)


async def started(make: Callable[[], Made]) -> Made:
    """Start a process in a thread. Who does not want it any more, before it is ready, leaves none behind."""
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        (await making).close()
        raise
