"""Lanes: the two streams to the source, whatever carries them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.v1 import page_pb2


class Lanes(Protocol):
    """Both lanes of one connection, open. Every carrier passes tests/destination/lanes_conformance.py.

    A loss shows as FerryError(LANE_LOST) from any method; what a refusal of the source says, as its own reason. Each
    of the four streams' ends is used by one task at a time. Messages are those of page.proto, not decoded.
    """

    async def fetch(self, runs: Sequence[tuple[int, int]]) -> None:
        """Ask for runs of (first, pages) on the demand lane."""

    async def fetched(self) -> bytes:
        """Return the next answer of the demand lane."""

    async def push(self, runs: Sequence[tuple[int, int]], credit: int) -> None:
        """Ask for runs on the push lane, for at most `credit` bytes."""

    async def pushed(self) -> bytes:
        """Return the next answer of the push lane."""

    async def export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        """Ask for opaque pages, by number; returns bundles that hold at least these."""

    async def complete(self, pages: int) -> None:
        """Tell the source that all of its pages are installed; on return it has let them go."""

    async def close(self) -> None:
        """Let the connection go. Says nothing to the source about the memory."""


class LaneOpener(Protocol):
    """Opens lanes to one source, as often as they are lost."""

    async def open(self) -> Lanes:
        """Connect. FerryError(SOURCE_UNREACHABLE) while nobody answers; another reason when the source refuses."""
