"""What a VMM hands over: a userfaultfd, or its memory file with a userfault bitmap, or all three.

The three-descriptor form is that of Firecracker's branch for guest_memfd: userfaultfd, memory file, bitmap, in this
order; without a userfaultfd the other two.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.memfd_installer import MemfdInstaller
from pageferryd.destination.uffd_door import UffdDoor
from pageferryd.destination.uffd_installer import UffdInstaller
from pageferryd.destination.userfault_bitmap import UserfaultBitmap
from pageferryd.linux.filled import filled
from pageferryd.linux.memory_file import MemoryFile
from pageferryd.linux.userfaultfd import Userfaultfd, is_userfaultfd

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pageferryd.destination.door import FaultDoor
    from pageferryd.destination.installer import Installer

MAX_FDS = 3
_LARGEST_UFFD_PAGE = 512 << 20


class HandedOver(Protocol):
    """A guest's memory at its destination, by whatever way it came into the sidecar's hands."""

    @property
    def layout(self) -> Layout:
        """How its pages are installed."""

    @property
    def connection(self) -> socket.socket | None:
        """Where its VMM may send faults as JSON beside the other doors."""

    def installer(self) -> Installer:
        """Return what places the pages; it owns the descriptors from then on."""

    def doors(self) -> tuple[ExitDoor, Sequence[FaultDoor]]:
        """Return the exit door, through which any guest's VMM may forward faults, and all doors."""

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where memory of 4 KiB pages is mapped in the VMM, as (address, bytes); nothing where unknown."""

    @property
    def guarded_addresses(self) -> Sequence[int]:
        """Where the regions lie in the VMM; empty where that is not known."""

    @property
    def kept(self) -> Mapping[str, int]:
        """Descriptors with which a later sidecar can go on, by what they are; none where it cannot."""

    async def in_place(self, pid: int) -> Sequence[tuple[int, int]]:
        """Return the runs of pages that are in place in the VMM `pid`, which an earlier sidecar has filled."""

    async def finished(self) -> None:
        """Every page is in: wait until the VMM needs no more answers. Doors must be open meanwhile."""

    def let_go(self) -> None:
        """Close what the installer does not own, once that has let the memory go."""

    def close(self) -> None:
        """Let all of it go."""


class Handoff(NamedTuple):
    """What a VMM handed over; `connection` stays open until the guest no longer needs the pager.

    `layout` is how its pages are installed: whole huge pages through a userfaultfd, 4 KiB through the memory file.
    """

    uffd: Userfaultfd | None
    addresses: AddressMap
    connection: socket.socket | None
    layout: Layout
    memory: MemoryFile | None = None
    bitmap: UserfaultBitmap | None = None

    def installer(self) -> Installer:
        """Return what places the pages; it owns the descriptors from then on."""
        if self.memory is not None and self.bitmap is not None:
            return MemfdInstaller(self.memory, self.bitmap, self.addresses, self.uffd)
        if self.uffd is None:
            raise FerryError(Reason.HANDOFF_NO_FD, "the hand-off has neither a userfaultfd nor a memory file")
        return UffdInstaller(self.uffd, self.addresses)

    def doors(self) -> tuple[ExitDoor, Sequence[FaultDoor]]:
        """Return the exit door, through which any guest's VMM may forward faults, and all doors."""
        exit_door = ExitDoor(self.layout)
        if self.uffd is None:
            return exit_door, [exit_door]
        return exit_door, [UffdDoor(self.uffd, self.addresses), exit_door]

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where memory of 4 KiB pages is mapped in the VMM, as (address, bytes)."""
        layout = self.addresses.layout
        for address, region in zip(self.addresses.addresses, layout.regions, strict=True):
            if region.page_size == PAGE_SIZE:
                yield address, region.size

    @property
    def guarded_addresses(self) -> Sequence[int]:
        """See HandedOver."""
        return self.addresses.addresses

    @property
    def kept(self) -> Mapping[str, int]:
        """See HandedOver. Not the connection: a VMM whose connection breaks asks its faults anew, where it can."""
        owned = {"uffd": self.uffd, "memory": self.memory, "bitmap": self.bitmap}
        return {name: one.fileno() for name, one in owned.items() if one is not None}

    async def in_place(self, pid: int) -> Sequence[tuple[int, int]]:
        """See HandedOver: of a bitmap, what lets accesses through; else what the kernel has mapped."""
        if self.bitmap is not None:
            return await asyncio.to_thread(self.bitmap.clear_runs)
        found: list[tuple[int, int]] = []
        layout = self.layout
        for address, region, start in zip(self.addresses.addresses, layout.regions, layout.starts, strict=True):
            for low, high in await asyncio.to_thread(filled, pid, address, region.size):
                found.append((start + (low - address) // PAGE_SIZE, (high - low) // PAGE_SIZE))
        return found

    async def finished(self) -> None:
        """Nothing to wait for: the kernel answers for pages that are in place."""

    def let_go(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()

    def close(self) -> None:
        """Let all of it go."""
        for owned in (self.uffd, self.memory, self.bitmap):
            if owned is not None:
                owned.close()
        self.let_go()


def taken_again(kept: Mapping[str, int], addresses: Sequence[int], layout: Layout) -> Handoff:
    """Make the hand-off again of which these descriptors were `kept`; they are closed where that cannot be.

    FerryError: HANDOFF_NO_FD, HANDOFF_REGIONS.
    """
    fds = list(kept.values())
    try:
        return assemble(fds, AddressMap(layout, addresses), None)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def guarded(fd: int, addresses: Sequence[int], layout: Layout) -> Handoff:
    """Make a hand-off of a userfaultfd that was taken from its VMM; it is closed where that cannot be.

    FerryError: HANDOFF_NO_FD where it is none, HANDOFF_REGIONS where addresses do not fit the guest.
    """
    owned = [fd]
    try:
        _refuse_giant_pages(layout)
        placed = AddressMap(layout, addresses)
        return Handoff(_own(owned, fd, Userfaultfd.adopt, []), placed, None, layout)
    except BaseException:
        for one in owned:
            os.close(one)
        raise


def assemble(fds: list[int], addresses: AddressMap, connection: socket.socket | None) -> Handoff:
    """Make a hand-off of its descriptors, which are taken out of `fds` one by one as they find an owner.

    FerryError: HANDOFF_NO_FD where they are none of the forms, HANDOFF_REGIONS where they do not fit the guest.
    """
    layout = addresses.layout
    guards = [fd for fd in fds if is_userfaultfd(fd)]
    files = [fd for fd in fds if fd not in guards]
    if len(guards) > 1 or len(files) not in (0, 2) or not fds:
        raise FerryError(
            Reason.HANDOFF_NO_FD,
            f"the hand-off came with {len(guards)} userfaultfds and {len(files)} other descriptors; it needs a "
            "userfaultfd, or a memory file and its bitmap, or all three",
        )
    owned: list[Any] = []
    try:
        uffd = _own(fds, guards[0], Userfaultfd.adopt, owned) if guards else None
        if uffd is not None:
            _refuse_giant_pages(layout)
        if not files:
            return Handoff(uffd, addresses, connection, layout)
        size = layout.page_count * PAGE_SIZE
        memory = _own(fds, files[0], lambda fd: MemoryFile(fd, size), owned)
        bitmap = _own(fds, files[1], lambda fd: UserfaultBitmap(fd, layout.page_count), owned)
    except BaseException:
        for one in owned:
            one.close()
        raise
    return Handoff(uffd, addresses, connection, layout if uffd is not None else _small(layout), memory, bitmap)


_Owner = TypeVar("_Owner", Userfaultfd, MemoryFile, UserfaultBitmap)


def _own(fds: list[int], fd: int, make: Callable[[int], _Owner], owned: list[Any]) -> _Owner:
    """Give a descriptor to the object that owns it from now on."""
    owner = make(fd)
    fds.remove(fd)
    owned.append(owner)
    return owner


def _refuse_giant_pages(layout: Layout) -> None:
    for region in layout.regions:
        if region.page_size > _LARGEST_UFFD_PAGE:
            raise FerryError(
                Reason.HANDOFF_REGIONS,
                f"the region at {region.guest_address:#x} has pages of {region.page_size >> 30} GiB, and a userfaultfd "
                "takes them only whole: one access would wait for all of it; hand over the memory file with a "
                "userfault bitmap instead, and forward the vCPUs' exits (the exit door)",
            )


def _small(layout: Layout) -> Layout:
    return Layout([Region(region.guest_address, region.size) for region in layout.regions])
