"""The memory of a guest, as a VMM in Python holds it.

Every access goes through libc by ctypes.CDLL, which lets go of the GIL: a thread that waits for a page in a fault then
stops no other one. (ctypes.memmove and memoryviews hold the GIL while they fault.)
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm import userfault
from pageferry.vmm.handoff import HandoffRegion
from pageferry.vmm.regions import HUGE_PAGE_SIZE, PAGE_SIZE, MemfdMemory, ProcessMemory, Region

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_memcpy = _libc.memcpy
_memcpy.restype = None
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_MAP_FAILED = ctypes.c_void_p(-1).value
# From linux/mman.h; Python's mmap module has it since 3.13 only.
_MAP_NORESERVE = 0x4000
_MADV_REMOVE = 9


class Backing(enum.StrEnum):
    """What lies under a guest's memory."""

    ANONYMOUS = "anonymous"
    """Private anonymous memory, 4 KiB pages."""
    SHMEM = "shmem"
    """A shared memfd, 4 KiB pages."""
    HUGETLBFS = "hugetlbfs"
    """A shared memfd of 2 MiB huge pages, which must have been reserved (vm.nr_hugepages)."""


class GuestMemory:
    """One mapping of `size` bytes, empty at first. Offsets and lengths are in bytes and checked: IndexError outside."""

    def __init__(self, size: int, backing: Backing = Backing.ANONYMOUS) -> None:
        self.size = size
        self.backing = backing
        self.page_size = HUGE_PAGE_SIZE if backing is Backing.HUGETLBFS else PAGE_SIZE
        if size <= 0 or size % self.page_size:
            raise FerryError(
                Reason.INVALID_ARGUMENT,
                f"guest memory of {size} bytes: {backing} memory comes in multiples of {self.page_size} bytes",
            )
        self.memfd = -1 if backing is Backing.ANONYMOUS else _make_memfd(size, backing)
        try:
            self.address = _map(size, self.memfd)
        except BaseException:
            self._close_memfd()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of the range."""
        address = self._at(offset, length)
        buffer = ctypes.create_string_buffer(length)
        _memcpy(buffer, address, length)
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        """Copy `data` to `offset`."""
        _memcpy(self._at(offset, len(data)), data, len(data))

    def discard(self, offset: int, length: int) -> None:
        """Give the pages of the range back to the host, as a balloon does; they read as zeroes afterwards.

        Whole pages only. Under a userfaultfd it blocks until the pager has read the REMOVE event.
        """
        if offset % self.page_size or length % self.page_size:
            raise ValueError(f"cannot discard {length} bytes at {offset}: not whole pages of {self.page_size}")
        advice = mmap.MADV_DONTNEED if self.backing is Backing.ANONYMOUS else _MADV_REMOVE
        if _madvise(self._at(offset, length), length, advice):
            number = ctypes.get_errno()
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

    def handoff_regions(self) -> list[HandoffRegion]:
        """Return the table for a hand-off: one region."""
        return [HandoffRegion(self.address, self.size, 0, self.page_size)]

    def open_userfault(self, *, user_mode_only: bool = False) -> int:
        """Return a userfaultfd to which faults on any missing page go from now on; call it before the first touch."""
        uffd = userfault.open_userfaultfd(_FEATURES[self.backing], user_mode_only=user_mode_only)
        try:
            userfault.register_missing(uffd, self.address, self.size)
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
        if self.size:
            _munmap(self.address, self.size)
            self.size = 0
            self._close_memfd()

    def _at(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"{length} bytes at {offset} are not within guest memory of {self.size} bytes")
        return self.address + offset

    def _close_memfd(self) -> None:
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1


_FEATURES = {
    Backing.ANONYMOUS: 0,
    Backing.SHMEM: abi.UFFD_FEATURE_MISSING_SHMEM,
    Backing.HUGETLBFS: abi.UFFD_FEATURE_MISSING_HUGETLBFS,
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


def _map(size: int, memfd: int) -> int:
    # Huge pages are reserved now (no NORESERVE): running out of them later would be a SIGBUS in the guest.
    flags = mmap.MAP_SHARED if memfd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    address = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, memfd, 0)
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise FerryError(
            Reason.NO_SPACE,
            f"cannot map {size} bytes of guest memory: {os.strerror(number)}; free memory, or reserve huge pages "
            "(vm.nr_hugepages) for hugetlbfs",
        )
    return int(address)
