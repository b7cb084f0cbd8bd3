"""The destination's kernel: a guest's memory under userfaultfd, with an oracle for what every page must hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum

from .clock import Clock, Violation
from .source import ZEROES, Content, Source

LONGEST_REMOVAL = 0.001
"""From when a discard's event is read until its pages are gone; no sidecar starts as fast."""


class Placed(Enum):
    DONE = "done"
    RETRY = "retry"
    EXISTS = "exists"


class Kernel:
    """Events wait in order until the shell reads them: ("fault", page, 1) and ("discard", first, pages)."""

    def __init__(self, rng: random.Random, clock: Clock, source: Source, refusal: float) -> None:
        self._rng = rng
        self._clock = clock
        self._refusal = refusal
        self.memory: dict[int, Content] = {}
        self.expected: list[Content] = [source.content(page) for page in range(len(source.kinds))]
        self._own = list(self.expected)
        self.events: list[tuple[str, int, int]] = []
        self.readable: Callable[[], None]
        self.registered = True
        self._sleepers: dict[int, list[Callable[[], None]]] = {}
        self._removals: list[tuple[int, int, Callable[[], None]]] = []
        self._removed: set[int] = set()
        self._unnoted: list[tuple[int, int]] = []
        self._doubtful: set[int] = set()

    # The guest's side

    def touch(self, page: int, resume: Callable[[], None]) -> Content | None:
        """Return what the page holds, or None: the thread sleeps until `resume`."""
        content = self.memory.get(page)
        if content is None and not self.registered:
            content = self.memory[page] = ZEROES
        if content is None:
            self._sleepers.setdefault(page, []).append(resume)
            self._queue("fault", page, 1)
            return None
        if content != self.expected[page] and not self._is_being_removed(page):
            raise Violation(f"the guest read {content} at page {page}, which holds {self.expected[page]}")
        return content

    def write(self, page: int, content: Content) -> None:
        self.memory[page] = self.expected[page] = content

    def remove(self, first: int, pages: int, resume: Callable[[], None]) -> None:
        """Discard a range: the event is queued, and the range is emptied once it was read."""
        if not self.registered:
            self._empty(first, pages)
            self._clock.after(0, resume)
            return
        self._removals.append((first, pages, resume))
        self._queue("discard", first, pages)

    def _is_being_removed(self, page: int) -> bool:
        return any(first <= page < first + pages for first, pages, _ in self._removals)

    def _empty(self, first: int, pages: int) -> None:
        for page in range(first, first + pages):
            self.memory.pop(page, None)
            self.expected[page] = ZEROES
            self._removed.add(page)

    def _queue(self, what: str, first: int, pages: int) -> None:
        self.events.append((what, first, pages))
        self.readable()

    # The shell's side

    def read(self) -> list[tuple[str, int, int]]:
        """Read the queued events. The threads that discard go on a little later."""
        events, self.events = self.events, []
        for what, first, pages in events:
            if what == "discard":
                self._unnoted.append((first, pages))
                self._clock.after(self._rng.random() * LONGEST_REMOVAL, self._finish_removal, first, pages)
        return events

    def noted(self, first: int, pages: int) -> None:
        """The sidecar has noted a discard that it read: from now on every later one knows of it."""
        self._unnoted.remove((first, pages))
        self._doubtful.difference_update(range(first, first + pages))

    def reader_died(self) -> None:
        """It ended with discards in hand that it had read and not noted: their pages are zero, or what the source had.

        Nobody can know of these: a guest goes on as soon as its discard was read.
        """
        for first, pages in self._unnoted:
            self._doubtful.update(range(first, first + pages))
        self._unnoted.clear()

    def present(self) -> list[tuple[int, int]]:
        """Return the runs of pages that are in place."""
        runs: list[tuple[int, int]] = []
        for page in sorted(self.memory):
            if runs and sum(runs[-1]) == page:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((page, 1))
        return runs

    def _finish_removal(self, first: int, pages: int) -> None:
        for removal in self._removals:
            if removal[:2] == (first, pages):
                self._removals.remove(removal)
                self._empty(first, pages)
                self._clock.after(0, removal[2])
                return

    def install(self, first: int, contents: list[Content], *, whole: bool) -> tuple[int, Placed]:
        """Put pages in place, a granule as a `whole`; return how many, and why it stopped."""
        done, how = 0, Placed.DONE
        for page, content in enumerate(contents, first):
            if done == 0 or not whole:
                how = self._obstacle(page)
            if how is Placed.EXISTS:
                self._other_way(page, len(contents) if whole else 1)
            if how is not Placed.DONE:
                break
            if page in self.memory:
                raise Violation(f"page {page} was installed twice")
            if content != self.expected[page]:
                if page not in self._doubtful or content != self._own[page]:
                    raise Violation(f"page {page} got {content} instead of {self.expected[page]}")
                self.expected[page] = content
            self._doubtful.discard(page)
            self.memory[page] = content
            done += 1
        self.wake(first, done)
        return done, how

    def _obstacle(self, page: int) -> Placed:
        if self._removals:
            return Placed.RETRY
        if self._refusal and self._rng.random() < self._refusal:
            if self._rng.random() < 0.5 and page not in self._removed and page not in self.memory:
                return Placed.EXISTS
            return Placed.RETRY
        return Placed.DONE

    def _other_way(self, first: int, pages: int) -> None:
        """Another way into the same memory is faster."""
        for page in range(first, first + pages):
            self.memory[page] = self._own[page]

    def install_zero(self, page: int) -> Placed:
        """Answer a fault on a discarded page; one that was answered already is only woken."""
        if self._removals or self._rng.random() < self._refusal:
            return Placed.RETRY
        if page not in self.memory:
            if self.expected[page] != ZEROES:
                raise Violation(f"page {page} got zeroes instead of {self.expected[page]}")
            self.memory[page] = ZEROES
        self.wake(page, 1)
        return Placed.DONE

    def wake(self, first: int, pages: int) -> None:
        for page in range(first, first + pages) if pages < 64 else list(self._sleepers):
            if first <= page < first + pages:
                for resume in self._sleepers.pop(page, ()):
                    self._clock.after(0, resume)

    def check_all_was_here(self) -> None:
        for page in range(len(self.expected)):
            if page not in self.memory and page not in self._removed and not self._is_being_removed(page):
                raise Violation(f"the source let go of the memory, and page {page} is missing")

    def unregister(self) -> None:
        """The pages are let go: whatever is missing now would read as zeroes."""
        for first, pages, _ in list(self._removals):
            self._finish_removal(first, pages)
        for page, expected in enumerate(self.expected):
            if page not in self.memory and expected != ZEROES:
                raise Violation(f"page {page} was missing when the memory was let go")
            if page not in self.memory and page not in self._removed:
                raise Violation(f"page {page} was let go before anyone had said that it is zeroes")
        self.registered = False
        for page in list(self._sleepers):
            self.wake(page, 1)

    @property
    def unheard(self) -> list[int]:
        """Pages that threads wait for although the events of that were read."""
        queued = {first for what, first, _ in self.events if what == "fault"}
        return [page for page in self._sleepers if page not in queued]

    @property
    def asleep(self) -> int:
        return sum(map(len, self._sleepers.values()))
