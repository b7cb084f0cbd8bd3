"""Lanes: the two streams to the source, whatever carries them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pageferry.v1 import page_pb2


class Lanes(Protocol):
    """Both lanes of one connection, open. Every carrier passes tests/destination/lanes_conformance.py.

    A loss shows as FerryError(LANE_LOST) from any method; what a refusal of the source says, as its own reason. Each
    of the four streams' ends is used by one task at a time. Messages are those of page.proto, not decoded.
    """

    checksums: bool
    """Whether their pages must carry checksums, as the migration's policy says: for `decode`."""

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


@runtime_checkable
class PromptLanes(Lanes, Protocol):
    """Lanes whose demand lane needs no task, so that a fault waits for no turn of the event loop.

    `fetched` is not used then.
    """

    def fetch_now(self, runs: Sequence[tuple[int, int]]) -> None:
        """Ask as `fetch` does, at once."""

    async def deliver_fetched(self, deliver: Callable[[bytes], None]) -> None:
        """Call `deliver` with each answer of the demand lane as it comes; raise what ends that, or what it raises."""


class LaneOpener(Protocol):
    """Opens lanes to one source, as often as they are lost."""

    async def open(self) -> Lanes:
        """Connect. FerryError(SOURCE_UNREACHABLE) while nobody answers; another reason when the source refuses."""
