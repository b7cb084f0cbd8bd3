"""Installers: how pages are put in place, and those that wait for them woken."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Placed(Enum):
    """How far an install came."""

    DONE = "done"
    """All of it is in place."""
    PRESENT = "present"
    """The page behind those that were placed was there already."""
    RETRY = "retry"
    """The kernel has events queued: drain the door, then try the rest again."""
    UNMAPPED = "unmapped"
    """The page behind those that were placed has no memory any more: nobody can touch it."""


class Installer(Protocol):
    """Puts pages in place. Runs lie within one granule or consist of whole ones; they may cross regions.

    Each method returns how many pages were placed, and what stopped it. Raises FerryError(VMM_GONE) when the VMM has
    ended. Every installer passes tests/destination/installer_conformance.py.
    """

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        """Place pages whose bytes are at `data[offset:]`, and wake who waits for them."""

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        """Place zeroes."""

    def poison(self, first: int, pages: int) -> tuple[int, Placed]:
        """Make each access fail like a memory error."""

    def touched_again(self, first: int, pages: int) -> tuple[int, Placed]:
        """Let an access to pages go on that were placed before.

        PRESENT where they are still there; DONE where the VMM had dropped them without a word, and they are zero now.
        """

    def let_through(self, first: int, pages: int) -> None:
        """Let accesses to pages through that the VMM has placed itself, as it does private ones."""

    def given_away(self, first: int, pages: int) -> None:
        """The guest gave pages away, or converts them: what may be in place of them must not be seen again."""

    def wake(self, first: int, pages: int) -> None:
        """Wake who waits for pages that are in place."""

    def release(self) -> None:
        """Let the guest's memory go for good: only when every page is in place."""

    def abandon(self) -> None:
        """Let go without a word to the kernel about missing pages: only when the VMM has ended."""
