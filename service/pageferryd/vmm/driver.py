"""What the sidecar asks of a VMM, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from pageferry.v1 import memory_pb2, vmm_pb2
    from pageferryd.core.layout import Layout
    from pageferryd.linux.vmm_directory import VmmDirectory


class Activity(Enum):
    """What a VMM is doing."""

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"


@dataclass(frozen=True)
class Memory:
    """A guest's memory at its source: one location a region.

    `holder` is the process whose descriptors and memory the locations mean.
    """

    layout: Layout
    locations: Sequence[memory_pb2.MemoryLocation]
    holder: int


@dataclass(frozen=True)
class Description:
    """What a VMM is, and what it is doing.

    `layout` is its guest's memory: None where that is known only with the guest's state (Saved.memory at a source), and
    while incoming where the VMM takes any guest. `memory` says where that can be read; None while incoming.
    """

    activity: Activity
    pid: int
    layout: Layout | None
    memory: Memory | None = None
    memory_bytes: int = 0
    """Size of the guest's memory, where `layout` does not tell."""
    machine: str = ""
    """What must be the same at both ends beside the memory, as the VMM names it; empty where nothing must."""
    obstacles: Sequence[str] = ()
    """Why the guest cannot be moved now, a sentence each."""


@dataclass(frozen=True)
class Saved:
    """The device state of a stopped guest, and its memory where that was not known before."""

    state: bytes
    memory: Memory | None = None


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


@dataclass(frozen=True)
class GuardedMemory:
    """A userfaultfd that a driver took from its VMM, registered over all of the guest's memory.

    `uffd` belongs to who takes this. `addresses` are where each region of the layout lies in the VMM.
    """

    uffd: int
    addresses: Sequence[int]


@dataclass(frozen=True)
class GivenFiles:
    """Empty memory files that a driver made for its VMM, and the connection at which the VMM asks for their pages.

    `files` are (descriptor, offset in bytes), one a region of the layout. Descriptors, each once though several regions
    may lie in one, and connection belong to who takes this.
    """

    files: Sequence[tuple[int, int]]
    connection: socket.socket


class PagerSeat(Protocol):
    """What will fill an incoming VMM's memory, as its driver sees it."""

    @property
    def layout(self) -> Layout:
        """The guest's memory, as it is at the source."""

    @property
    def directory(self) -> VmmDirectory:
        """For sockets and files of this migration; it is removed with all that is in it."""

    @property
    def socket_path(self) -> str:
        """Where a VMM that hands its memory over by itself connects (docs/handoff.md), as that VMM sees it."""

    @property
    def faults(self) -> FaultEndpoint:
        """Where it forwards its vCPUs' exits."""

    def take(self, memory: GuardedMemory | GivenFiles) -> None:
        """Take memory that the driver got hold of itself. FerryError(HANDOFF_*) where it cannot be: it is closed."""


class VmmDriver(Protocol):
    """One VMM. Every method may raise FerryError: VMM_UNREACHABLE, VMM_FAILED, or a reason of the VMM's own.

    Every driver passes tests/vmm/driver_conformance.py.
    """

    memory_comes_with_state: bool
    """Whether an incoming VMM hands its memory over only as it loads its guest's state, and not before."""

    async def describe(self) -> Description:
        """Tell what there is. FerryError(LAYOUT_INVALID) where it cannot be."""

    async def attach_pager(self, seat: PagerSeat) -> None:
        """Ready an incoming VMM: unless its memory comes with the state, have that handed over, or take it."""

    async def ready_to_pause(self) -> None:
        """Do all of a pause and a save for which the guest need not stand still."""

    async def pause(self) -> None:
        """Stop the guest; its memory does not change any more."""

    async def save_state(self) -> Saved:
        """Return the device state of the stopped guest."""

    async def private_pages(self) -> PrivatePages:
        """Tell what of the stopped guest is private to it."""

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Export opaque pages of the stopped guest, in bundles that hold at least these."""

    async def load_state(self, state: bytes) -> None:
        """Load a device state into an incoming VMM, which touches its memory meanwhile; it does not run yet."""

    async def resume(self) -> None:
        """Let the guest run: at its destination, or again at its source when it was not moved after all."""

    async def detach_pager(self) -> None:
        """Tell the VMM that every page is in."""

    async def kill(self) -> None:
        """End the VMM. Harmless when it has ended."""

    async def close(self) -> None:
        """Let the connection go; the VMM is not touched."""
