"""How a sidecar's life ends: after so many steps, wherever that is, and with whatever it had in hand."""

from __future__ import annotations

import random

from .clock import Killed
from .journal import Journal
from .kernel import Kernel, Placed
from .source import Content


class Fate:
    """Counts what a sidecar does to the world outside. `completing` is how much it still does once all pages are in."""

    def __init__(self, steps: float = float("inf"), completing: float = float("inf")) -> None:
        self.left = steps
        self._completing = completing

    @property
    def endless(self) -> bool:
        return min(self.left, self._completing) == float("inf")

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def completes(self) -> None:
        self.left = min(self.left, self._completing)


class MortalKernel:
    """The kernel as one sidecar calls it, which may be killed before and after each call, never within."""

    def __init__(self, kernel: Kernel, fate: Fate) -> None:
        self._kernel = kernel
        self._fate = fate

    def read(self) -> list[tuple[str, int, int]]:
        self._fate.step()
        events = self._kernel.read()
        self._fate.step()
        return events

    def install(self, first: int, contents: list[Content], *, whole: bool) -> tuple[int, Placed]:
        self._fate.step()
        placed = self._kernel.install(first, contents, whole=whole)
        self._fate.step()
        return placed

    def install_zero(self, page: int) -> Placed:
        self._fate.step()
        return self._kernel.install_zero(page)

    def wake(self, first: int, pages: int) -> None:
        self._fate.step()
        self._kernel.wake(first, pages)

    def present(self) -> list[tuple[int, int]]:
        self._fate.step()
        return self._kernel.present()

    def unregister(self) -> None:
        self._fate.step()
        self._kernel.unregister()
        self._fate.step()


class MortalJournal:
    """The journal as one sidecar writes it. The kernel is told what is noted, for its oracle alone."""

    def __init__(self, rng: random.Random, journal: Journal, kernel: Kernel, fate: Fate) -> None:
        self._rng = rng
        self._journal = journal
        self._kernel = kernel
        self._fate = fate

    @property
    def whole(self) -> bool:
        return self._journal.whole

    def note(self, first: int, pages: int) -> None:
        try:
            self._fate.step()
        except Killed:
            self._journal.note(first, pages, self._rng.randrange(16))
            raise
        self._journal.note(first, pages)
        self._kernel.noted(first, pages)

    def note_whole(self) -> None:
        self._fate.step()
        self._journal.whole = True
        self._fate.completes()

    def open(self) -> list[tuple[int, int]]:
        self._fate.step()
        return self._journal.open()


Hands = tuple[MortalKernel | Kernel, MortalJournal]
"""What one sidecar has to do with of the world outside."""
