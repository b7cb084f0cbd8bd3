"""What the sidecar asks of a VMM, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.v1 import memory_pb2
    from pageferryd.core.layout import Layout


class Activity(Enum):
    """What a VMM is doing."""

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"


@dataclass(frozen=True)
class Description:
    """A guest's memory, where it can be read (nowhere while incoming), and what its VMM is doing."""

    layout: Layout
    locations: Sequence[memory_pb2.MemoryLocation]
    activity: Activity
    pid: int


@dataclass(frozen=True)
class FaultEndpoint:
    """Where a VMM forwards faults that no userfaultfd sees: a Unix socket, and the secret to show there."""

    socket_path: str
    token: bytes


class VmmDriver(Protocol):
    """One VMM. Every method may raise FerryError: VMM_UNREACHABLE, VMM_FAILED, or a reason of the VMM's own.

    Every driver passes tests/vmm/driver_conformance.py.
    """

    async def describe(self) -> Description:
        """Tell what there is. FerryError(LAYOUT_INVALID) where it cannot be."""

    async def attach_pager(self, socket_path: str, faults: FaultEndpoint) -> None:
        """Make an incoming VMM hand its memory over at a Unix socket, and tell it where its vCPUs' exits go."""

    async def pause(self) -> None:
        """Stop the guest; its memory does not change any more."""

    async def save_state(self) -> bytes:
        """Return the device state of the stopped guest."""

    async def private_pages(self) -> Sequence[tuple[int, int]]:
        """Return what of the stopped guest is private to it: (guest address, bytes), page-aligned; none for most."""

    async def load_state(self, state: bytes) -> None:
        """Load a device state into an incoming VMM."""

    async def resume(self) -> None:
        """Let the guest run."""

    async def detach_pager(self) -> None:
        """Tell the VMM that every page is in."""

    async def kill(self) -> None:
        """End the VMM. Harmless when it has ended."""

    async def close(self) -> None:
        """Let the connection go; the VMM is not touched."""
