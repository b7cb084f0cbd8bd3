"""The exit door: vCPU exits that a VMM forwards, since no userfaultfd sees an access to its memory.

It takes faults from any transport (FaultService, or JSON on the hand-off's socket) as one callback each, and answers
each when all of its pages are settled, in whatever order that happens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.door import DoorEvents, Settled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pageferryd.core.layout import Layout

MAX_FAULT_BYTES = 2 << 20
MAX_WAITING = 4096
"""Most faults that wait at once: more than any guest has vCPUs."""

# What a fault over several pages is answered with, the worst first.
_SEVERITY = (Settled.POISONED, Settled.INSTALLED, Settled.ZERO, Settled.PRESENT)


@dataclass(slots=True, eq=False)
class _Waiting:
    pages: set[int]
    answer: Callable[[Settled], None]
    seen: set[Settled] = field(default_factory=set)


class ExitDoor:
    """Faults forwarded by one guest's VMM."""

    name = "exit"
    listens = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._deliver: Callable[[DoorEvents], None] | None = None
        self._failed: Callable[[Exception], None] = lambda _error: None
        self._waiting: dict[int, list[_Waiting]] = {}
        self._count = 0

    def open(self, deliver: Callable[[DoorEvents], None], failed: Callable[[Exception], None]) -> None:
        """Begin to deliver."""
        self._deliver, self._failed = deliver, failed

    @property
    def waiting(self) -> int:
        """How many faults wait for their answer."""
        return self._count

    def drain(self) -> None:
        """Nothing is queued here: a fault is delivered when it is forwarded."""

    def close(self) -> None:
        """Stop delivering; who waits is not answered."""
        self._deliver = None

    def fault(self, first: int, pages: int, answer: Callable[[Settled], None]) -> Callable[[], None]:
        """Take a fault; `answer` is called once when it is settled, perhaps before this returns.

        Returns what to call when nobody waits for the answer any more. FerryError: INVALID_ARGUMENT where it is too
        large, TOO_MANY_MIGRATIONS where too many wait, ILLEGAL_STATE while the guest is not here.
        """
        if pages * PAGE_SIZE > MAX_FAULT_BYTES:
            raise FerryError(
                Reason.INVALID_ARGUMENT, f"a fault of {pages} pages is too large: at most 512 are answered"
            )
        waiting = _Waiting(set(range(first, first + pages)), answer)
        self._take([waiting], range(first, first + pages))
        return lambda: self._forget(waiting)

    def faults(self, asked: Sequence[tuple[int, Callable[[Settled], None]]]) -> None:
        """Take faults on single pages that came together, each with its `answer`; all or none. Raises as `fault`."""
        self._take([_Waiting({page}, answer) for page, answer in asked], [page for page, _ in asked])

    def _take(self, arrived: Sequence[_Waiting], pages: Sequence[int]) -> None:
        if self._deliver is None:
            raise FerryError(Reason.ILLEGAL_STATE, "faults are not served: the guest's memory is not on its way here")
        if self._count + len(arrived) > MAX_WAITING:
            raise FerryError(Reason.TOO_MANY_MIGRATIONS, f"more than {MAX_WAITING} faults would wait at once")
        for waiting in arrived:
            for page in waiting.pages:
                self._waiting.setdefault(page, []).append(waiting)
        self._count += len(arrived)
        try:
            self._deliver(DoorEvents((), pages, time.monotonic()))
        except BaseException as error:
            # Whoever asked is told now, and must not be answered again.
            for waiting in arrived:
                self._forget(waiting)
            if isinstance(error, (FerryError, OSError)):
                self._failed(error)
            raise

    def settled(self, first: int, pages: int, how: Settled) -> None:
        """Answer those that waited for pages of the run only."""
        if not self._waiting:
            return
        if pages == 1:
            touched = [first] if first in self._waiting else []
        elif pages <= len(self._waiting):
            touched = [page for page in range(first, first + pages) if page in self._waiting]
        else:
            touched = [page for page in self._waiting if first <= page < first + pages]
        for page in touched:
            for waiting in self._waiting.pop(page):
                waiting.seen.add(how)
                waiting.pages.discard(page)
                if not waiting.pages:
                    self._count -= 1
                    waiting.answer(next(one for one in _SEVERITY if one in waiting.seen))

    def _forget(self, waiting: _Waiting) -> None:
        for page in waiting.pages:
            others = [one for one in self._waiting.get(page, ()) if one is not waiting]
            if others:
                self._waiting[page] = others
            else:
                self._waiting.pop(page, None)
        if waiting.pages:
            self._count -= 1
            waiting.pages.clear()
