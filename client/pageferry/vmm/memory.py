"""The memory of a guest, as a VMM in Python holds it: anonymous, or a memfd of small or huge pages."""

from __future__ import annotations

import enum
import mmap
import os

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm import userfault
from pageferry.vmm.handoff import HandoffRegion
from pageferry.vmm.mapping import MappedMemory
from pageferry.vmm.regions import HUGE_PAGE_SIZE, PAGE_SIZE, MemfdMemory, ProcessMemory, Region

# From linux/mman.h.
_MADV_REMOVE = 9


class Backing(enum.StrEnum):
    """What lies under a guest's memory."""

    ANONYMOUS = "anonymous"
    """Private anonymous memory, 4 KiB pages."""
    SHMEM = "shmem"
    """A shared memfd, 4 KiB pages."""
    HUGETLBFS = "hugetlbfs"
    """A shared memfd of 2 MiB huge pages, which must have been reserved (vm.nr_hugepages)."""
    GUEST_MEMFD = "guest_memfd"
    """A guest_memfd, 4 KiB pages: see GuestMemfd, since only KVM makes one and no userfaultfd watches it."""


class GuestMemory(MappedMemory):
    """One mapping of `size` bytes, empty at first. Offsets and lengths are in bytes and checked: IndexError outside."""

    def __init__(self, size: int, backing: Backing = Backing.ANONYMOUS) -> None:
        if backing is Backing.GUEST_MEMFD:
            raise FerryError(Reason.INVALID_ARGUMENT, "only KVM makes a guest_memfd: take one from it for GuestMemfd")
        self.backing = backing
        self.page_size = HUGE_PAGE_SIZE if backing is Backing.HUGETLBFS else PAGE_SIZE
        if size <= 0 or size % self.page_size:
            raise FerryError(
                Reason.INVALID_ARGUMENT,
                f"guest memory of {size} bytes: {backing} memory comes in multiples of {self.page_size} bytes",
            )
        self.memfd = -1 if backing is Backing.ANONYMOUS else _make_memfd(size, backing)
        try:
            super().__init__(size, self.memfd)
        except BaseException:
            self._close_memfd()
            raise

    def discard(self, offset: int, length: int) -> None:
        """Give the pages of the range back to the host, as a balloon does; they read as zeroes afterwards.

        Whole pages only. Under a userfaultfd it blocks until the pager has read the REMOVE event.
        """
        if offset % self.page_size or length % self.page_size:
            raise ValueError(f"cannot discard {length} bytes at {offset}: not whole pages of {self.page_size}")
        advice = mmap.MADV_DONTNEED if self.backing is Backing.ANONYMOUS else _MADV_REMOVE
        number = self.advise(offset, length, advice)
        if number:
            raise FerryError(
                Reason.VMM_FAILED, f"cannot discard {length} bytes of guest memory at {offset}: {os.strerror(number)}"
            )

    def location(self, offset: int = 0) -> ProcessMemory | MemfdMemory:
        """Return where another process can read the bytes from `offset` on."""
        if self.backing is Backing.ANONYMOUS:
            return ProcessMemory(self.address + offset)
        return MemfdMemory(self.memfd, offset)

    def region(self, guest_address: int = 0) -> Region:
        """Return all of the memory as one region of the guest."""
        return Region(guest_address, self.size, self.page_size, self.location())

    def handoff_regions(self, guest_address: int | None = None) -> list[HandoffRegion]:
        """Return the table for a hand-off: one region. `guest_address` is needed where the memory itself goes along."""
        return [HandoffRegion(self.address, self.size, 0, self.page_size, guest_address)]

    def open_userfault(self, *, user_mode_only: bool = False, minor: bool = False) -> int:
        """Return a userfaultfd to which faults on any missing page go from now on; call it before the first touch.

        With `minor`, faults on pages that the memfd has and this mapping lacks go there as well: for a pager that
        writes into the memfd.
        """
        features = _FEATURES[self.backing] | (_MINOR_FEATURES[self.backing] if minor else 0)
        uffd = userfault.open_userfaultfd(features, user_mode_only=user_mode_only)
        try:
            userfault.register_missing(uffd, self.address, self.size, minor=minor)
        except BaseException:
            os.close(uffd)
            raise
        return uffd

    def release_userfault(self, uffd: int) -> None:
        """Undo `open_userfault` before the guest has run, when no pager took it: the memory is empty and free again."""
        try:
            userfault.unregister(uffd, self.address, self.size)
        finally:
            os.close(uffd)

    def close(self) -> None:
        """Unmap the memory. Nothing may use it any more; a second call does nothing."""
        super().close()
        self._close_memfd()

    def _close_memfd(self) -> None:
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1


_FEATURES = {
    Backing.ANONYMOUS: 0,
    Backing.SHMEM: abi.UFFD_FEATURE_MISSING_SHMEM,
    Backing.HUGETLBFS: abi.UFFD_FEATURE_MISSING_HUGETLBFS,
}

_MINOR_FEATURES = {
    Backing.SHMEM: abi.UFFD_FEATURE_MINOR_SHMEM,
    Backing.HUGETLBFS: abi.UFFD_FEATURE_MINOR_HUGETLBFS,
}


def _make_memfd(size: int, backing: Backing) -> int:
    flags = os.MFD_CLOEXEC
    if backing is Backing.HUGETLBFS:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    try:
        memfd = os.memfd_create("guest-memory", flags)
    except OSError as error:
        raise FerryError(Reason.NO_SPACE, f"cannot create a {backing} memfd for guest memory: {error}") from error
    try:
        os.ftruncate(memfd, size)
    except OSError as error:
        os.close(memfd)
        raise FerryError(Reason.NO_SPACE, f"cannot size a {backing} memfd to {size} bytes: {error}") from error
    return memfd
