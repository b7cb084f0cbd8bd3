"""What the sidecar asks of a VMM, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.v1 import memory_pb2, vmm_pb2
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
    token: bytes = field(repr=False)


@dataclass(frozen=True)
class PrivatePages:
    """What of a guest is private to it: ranges of (guest address, bytes), page-aligned; none for most.

    Opaque ones can be read by nobody but the VMM, which exports them.
    """

    ranges: Sequence[tuple[int, int]] = ()
    opaque: bool = False


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

    async def private_pages(self) -> PrivatePages:
        """Tell what of the stopped guest is private to it."""

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Export opaque pages of the stopped guest, in bundles that hold at least these."""

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
