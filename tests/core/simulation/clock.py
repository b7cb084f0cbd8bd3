"""The fake clock: events in order of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

START = 1000.0


class Violation(AssertionError):
    """An invariant that did not hold."""


class Killed(Exception):  # noqa: N818 - no error: the end of a sidecar, in the middle of what it did
    pass


class Clock:
    """`killed` is called when a sidecar ended in the middle of an event, with whatever it had in hand."""

    def __init__(self, trace: Callable[[str], None] | None = None) -> None:
        self.now = START
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._trace = trace
        self.killed: Callable[[], None]

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), call, args))

    def after(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), call, args))

    def note(self, *what: object) -> None:
        """Trace what happens. The words are put together only where somebody reads them."""
        if self._trace is not None:
            self._trace(f"{self.now - START:12.6f} {' '.join(map(str, what))}")

    def run(self, done: Callable[[], bool], seconds: float, events: int) -> None:
        """Run until `done`, at most so many seconds and events."""
        for _ in range(events):
            if done():
                return
            if not self._heap:
                raise Violation("nothing is left to happen, and the migration is not over")
            self.now, _, call, args = heapq.heappop(self._heap)
            if self.now > START + seconds:
                raise Violation(f"the migration did not end within {seconds} s")
            try:
                call(*args)
            except Killed:
                self.killed()
        raise Violation(f"the migration did not end within {events} events")
