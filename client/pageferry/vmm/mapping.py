"""A mapping of guest memory that can be touched without stopping other threads.

Every access goes through libc by ctypes.CDLL, which lets go of the GIL: a thread that waits for a page in a fault then
stops no other one. (ctypes.memmove and memoryviews hold the GIL while they fault.)
"""

from __future__ import annotations

import ctypes
import mmap
import os

from pageferry.errors import FerryError, Reason

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


class MappedMemory:
    """`size` bytes of a shared file, or private anonymous ones where `fd` is negative; mapped at `address`.

    Offsets and lengths are in bytes and checked: IndexError outside.
    """

    def __init__(self, size: int, fd: int) -> None:
        self.address = _map(size, fd)
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of the range."""
        address = self._at(offset, length)
        buffer = ctypes.create_string_buffer(length)
        _memcpy(buffer, address, length)
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        """Copy `data` to `offset`."""
        _memcpy(self._at(offset, len(data)), data, len(data))

    def advise(self, offset: int, length: int, advice: int) -> int:
        """Call madvise(2) for the range; return its errno, or 0."""
        return ctypes.get_errno() if _madvise(self._at(offset, length), length, advice) else 0

    def close(self) -> None:
        """Unmap the memory. Nothing may use it any more; a second call does nothing."""
        if self.size:
            _munmap(self.address, self.size)
            self.size = 0

    def _at(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"{length} bytes at {offset} are not within guest memory of {self.size} bytes")
        return self.address + offset


def _map(size: int, fd: int) -> int:
    # Huge pages are reserved now (no NORESERVE): running out of them later would be a SIGBUS in the guest.
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    address = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise FerryError(
            Reason.NO_SPACE,
            f"cannot map {size} bytes of guest memory: {os.strerror(number)}; free memory, or reserve huge pages "
            "(vm.nr_hugepages) for hugetlbfs",
        )
    return int(address)
