"""Write a guest's memory through its file: a memfd, or a guest_memfd of KVM.

A memfd takes pwrite(2), which does no harm where a hostile VMM has cut the file short. A guest_memfd takes no write(2),
only stores through a mapping (KVM_CREATE_GUEST_MEMFD with GUEST_MEMFD_FLAG_MMAP, Linux 6.18); it cannot be cut short.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from pathlib import Path

from pageferry.errors import FerryError, Reason
from pageferryd.linux.buffers import address_of

# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_GUEST_MEMFD = "anon_inode:[guest_memfd]"
_GUEST_MEMFD_OLD = "anon_inode:[kvm-gmem]"
# linux/fcntl.h
_F_GET_SEALS = 1034


class MemoryFile:
    """A guest's memory file of `size` bytes, whose descriptor this object owns."""

    def __init__(self, fd: int, size: int) -> None:
        """FerryError(HANDOFF_REGIONS) where the file is shorter, HANDOFF_NO_FD where it is no memory file."""
        self._fd = fd
        self._mapping: mmap.mmap | None = None
        self.is_guest_memfd = is_guest_memfd(fd)
        if not self.is_guest_memfd and not is_memfd(fd):
            raise FerryError(
                Reason.HANDOFF_NO_FD, "the descriptor handed over as memory is neither memfd nor guest_memfd"
            )
        found = os.fstat(fd).st_size
        if found < size:
            raise FerryError(Reason.HANDOFF_REGIONS, f"the memory file has {found} bytes, and the regions {size}")
        if self.is_guest_memfd:
            self._mapping = _map(fd, size)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def write(self, offset: int, data: bytes, start: int, length: int) -> None:
        """Write `length` bytes of `data` from `start` on. FerryError(NO_SPACE) where the host has no memory left."""
        if self._mapping is not None:
            ctypes.memmove(self._address + offset, address_of(data, start), length)
            return
        try:
            written = os.pwrite(self._fd, memoryview(data)[start : start + length], offset)
        except OSError as error:
            raise FerryError(Reason.NO_SPACE, f"cannot write guest memory at {offset}: {error.strerror}") from error
        if written < length:
            raise FerryError(Reason.NO_SPACE, f"only {written} of {length} bytes of guest memory were written")

    def punch(self, offset: int, length: int) -> None:
        """Make a range a hole: it reads as zeroes."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
        if libc.fallocate(self._fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length):
            number = ctypes.get_errno()
            raise FerryError(Reason.NO_SPACE, f"cannot free guest memory at {offset}: {os.strerror(number)}")

    def close(self) -> None:
        """Let the file go. Twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # ctypes keeps an export of the mapping until it is collected: the mapping goes with this object.
            self._mapping = None
            os.close(fd)


def is_guest_memfd(fd: int) -> bool:
    """Say whether a descriptor is a guest_memfd."""
    return _link(fd) in (_GUEST_MEMFD, _GUEST_MEMFD_OLD)


def is_memfd(fd: int) -> bool:
    """Say whether a descriptor is a memfd (memfd_create(2)), on shmem or hugetlbfs."""
    return _link(fd).startswith("/memfd:") and stat.S_ISREG(os.fstat(fd).st_mode)


def forbid_shrinking(fd: int) -> None:
    """Make sure that a memfd keeps its size: a mapping of it would fault otherwise. FerryError(HANDOFF_REGIONS)."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        if fcntl.fcntl(fd, _F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return
        raise FerryError(
            Reason.HANDOFF_REGIONS,
            "the userfault bitmap's memfd may be cut short: create it with MFD_ALLOW_SEALING",
        ) from error


def _link(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def _map(fd: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise FerryError(
            Reason.HANDOFF_NO_FD,
            f"the guest_memfd cannot be mapped: {error}; create it with GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED",
        ) from error
