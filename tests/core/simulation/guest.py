"""The guest: threads that touch, check, write and give away pages."""

from __future__ import annotations

import random
from itertools import count

from pageferryd.core.layout import Layout

from .clock import Clock
from .kernel import Kernel
from .source import POISON

PATTERNS = ("random", "sequential", "backward", "local", "same")


class Guest:
    def __init__(
        self,
        rng: random.Random,
        clock: Clock,
        kernel: Kernel,
        layout: Layout,
        threads: int,
        steps: int,
        discards: float,
    ) -> None:
        self.rng = rng
        self.clock = clock
        self.kernel = kernel
        self.layout = layout
        self.discards = discards
        self.tokens = count(layout.page_count + 1)
        self.shared = rng.randrange(layout.page_count)
        self.threads = [Thread(self, rng.choice(PATTERNS), steps) for _ in range(threads)]

    @property
    def done(self) -> bool:
        return not any(thread.left for thread in self.threads)


class Thread:
    def __init__(self, guest: Guest, pattern: str, steps: int) -> None:
        self.guest = guest
        self.pattern = pattern
        self.left = steps
        self.at = guest.rng.randrange(guest.layout.page_count)
        guest.clock.after(guest.rng.random() * 0.01, self.step)

    def step(self) -> None:
        """Choose what to do next."""
        if not self.left:
            return
        if self.guest.rng.random() < self.guest.discards:
            self._discard()
        else:
            self._choose()
            self.touch()

    def _choose(self) -> None:
        rng, pages = self.guest.rng, self.guest.layout.page_count
        if self.pattern == "random":
            self.at = rng.randrange(pages)
        elif self.pattern == "sequential":
            self.at = (self.at + 1) % pages
        elif self.pattern == "backward":
            self.at = (self.at - 1) % pages
        elif self.pattern == "local":
            self.at = (self.at + rng.randint(-3, 5)) % pages
        else:
            # Every such thread runs along the same pages.
            self.at = (self.guest.shared + self.left) % pages

    def touch(self) -> None:
        content = self.guest.kernel.touch(self.at, self.touch)
        if content is None:
            return
        if content != POISON and self.guest.rng.random() < 0.4:
            self.guest.kernel.write(self.at, next(self.guest.tokens))
        self._go_on()

    def _discard(self) -> None:
        rng, layout = self.guest.rng, self.guest.layout
        first, pages = layout.granule(rng.randrange(layout.page_count))
        if pages == 1:
            pages = min(rng.choice((1, 1, 3, 12)), layout.end_of_region(first) - first)
        self.guest.clock.note(f"guest discards {first} to {first + pages}")
        self.guest.kernel.remove(first, pages, self._go_on)

    def _go_on(self) -> None:
        self.left -= 1
        self.guest.clock.after(self.guest.rng.random() * 0.002, self.step)
