"""Fault doors: how the touch of a missing page reaches the pager."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class DoorEvents(NamedTuple):
    """What a door saw at once. Discards come before faults: a fault may be read before a discard that precedes it."""

    discards: Sequence[tuple[int, int]]
    """Runs of pages that the guest gave away, as (first, pages): zero from now on."""
    faults: Sequence[int]
    """Pages that the guest waits for."""
    seen: float
    """When the door woke up for them, in seconds of the monotonic clock."""


class Settled(Enum):
    """How the wait for a page ended."""

    INSTALLED = "installed"
    """Its bytes are in place."""
    ZERO = "zero"
    """It is zero."""
    POISONED = "poisoned"
    """The source could not read it."""
    PRESENT = "present"
    """It was in place already."""


class FaultDoor(Protocol):
    """One way for faults to come in. Every door passes tests/destination/door_conformance.py."""

    name: str
    """The door's name in metrics."""
    listens: bool
    """Whether `settled` must be called: a userfaultfd wakes its waiters by itself."""

    def open(self, deliver: Callable[[DoorEvents], None], failed: Callable[[Exception], None]) -> None:
        """Begin to deliver, from the event loop. `failed` is called once where the door cannot go on."""

    def drain(self) -> None:
        """Deliver everything that is queued now: installs may be impossible before."""

    def settled(self, first: int, pages: int, how: Settled) -> None:
        """Answer who waits at this door for pages of a run."""

    def close(self) -> None:
        """Stop delivering. The guest's memory stays guarded. Closing twice does nothing."""
