"""Guest memory as Firecracker maps it, and the pages of it that the workload has."""

from __future__ import annotations

import ctypes
import mmap
import os

from pageferry.vmm.mapping import MappedMemory
from pageferryd.vmm.firecracker.memory import Ranges, possible_ranges

PAGE = 4096
MIB = 1 << 20
LOW = 1 * MIB
"""What lies below is not the workload's: Firecracker writes tables there at boot."""
BOOT_MARK = (0xE0000, b"RSD PTR ")
_LARGE = 256 * MIB
_EDGE = 8 * MIB

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_RW = mmap.PROT_READ | mmap.PROT_WRITE
_PROT_NONE = 0
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NORESERVE, _HUGETLB, _FIXED = 0x4000, 0x40000, 0x10


def _map(size: int, protection: int, flags: int, at: int | None = None) -> int:
    address = _libc.mmap(at, size, protection, flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return int(address)


class _Mapped(MappedMemory):
    """One region. With `guarded`, inaccessible pages lie before and behind it, as older releases have them."""

    def __init__(self, size: int, page_size: int, *, guarded: bool) -> None:
        flags = _PRIVATE | _NORESERVE | (_HUGETLB if page_size > PAGE else 0)
        if guarded:
            around = _map(size + 2 * PAGE, _PROT_NONE, _PRIVATE | _NORESERVE)
            self.address = _map(size, _RW, flags | _FIXED, around + PAGE)
        else:
            self.address = _map(size, _RW, flags)
        self.size = size


class FirecrackerMemory:
    """All regions, as one flat space in their order."""

    def __init__(self, ranges: Ranges, page_size: int, *, guarded: bool = False) -> None:
        self.ranges = ranges
        self.page_size = page_size
        self.mapped = [_Mapped(size, page_size, guarded=guarded) for _, size in ranges]
        self.size = sum(size for _, size in ranges)

    def read(self, offset: int, length: int) -> bytes:
        region, at = self._at(offset)
        return region.read(at, length)

    def write(self, offset: int, data: bytes) -> None:
        region, at = self._at(offset)
        region.write(at, data)

    def discard(self, offset: int, length: int) -> None:
        """As the balloon device does. Blocks until whoever watches the memory has been told."""
        region, at = self._at(offset)
        failed = region.advise(at, length, mmap.MADV_DONTNEED)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def _at(self, offset: int) -> tuple[MappedMemory, int]:
        for one in self.mapped:
            if offset < one.size:
                return one, offset
            offset -= one.size
        raise IndexError(offset)


def ranges_for(size: int) -> Ranges:
    """What current releases give a guest of so many bytes."""
    return possible_ranges(size, "x86_64")[0]


class WorkArea:
    """The workload's pages, numbered from 0: all above LOW, or of a large guest the edges of each region."""

    def __init__(self, memory: FirecrackerMemory) -> None:
        self.memory = memory
        self._pieces: list[tuple[int, int]] = []
        start = 0
        for _, size in memory.ranges:
            first = start or LOW
            end = start + size
            if memory.size <= _LARGE or size <= 2 * _EDGE:
                self._pieces.append((first, end - first))
            else:
                self._pieces += [(first, _EDGE), (end - _EDGE, _EDGE)]
            start = end
        self.size = sum(length for _, length in self._pieces)
        self.pages = self.size // PAGE

    def flat(self, offset: int) -> tuple[int, int]:
        """Return where an offset lies in memory, and how many bytes of the piece are left there."""
        for start, length in self._pieces:
            if offset < length:
                return start + offset, length - offset
            offset -= length
        raise IndexError(offset)

    def read(self, offset: int, length: int) -> bytes:
        found = b""
        while length:
            at, left = self.flat(offset)
            take = min(left, length)
            found += self.memory.read(at, take)
            offset, length = offset + take, length - take
        return found

    def write(self, offset: int, data: bytes) -> None:
        self.memory.write(self.flat(offset)[0], data)

    def discard(self, first: int, last: int) -> None:
        """Give the pages from `first` to before `last` back."""
        offset, end = first * PAGE, last * PAGE
        while offset < end:
            at, left = self.flat(offset)
            take = min(left, end - offset)
            self.memory.discard(at, take)
            offset += take
