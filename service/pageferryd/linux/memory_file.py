"""Write a guest's memory through its file: a memfd, or a guest_memfd of KVM.

No store through a mapping may raise SIGBUS here, whatever a hostile VMM does to its file: that would end the pager of
every guest. A memfd of small pages takes pwrite(2), which does no harm where the file was cut short. hugetlbfs and
guest_memfd (KVM_CREATE_GUEST_MEMFD with GUEST_MEMFD_FLAG_MMAP, Linux 6.18) take no write(2): there process_vm_writev(2)
writes into this process's own mapping, and fails where a store would raise the signal. Only a guest_memfd that the
kernel itself cannot reach, as one without a direct map, is stored to.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import Any, Final

from pageferry.errors import FerryError, Reason
from pageferryd.linux.buffers import address_of

# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_GUEST_MEMFD = "anon_inode:[guest_memfd]"
_GUEST_MEMFD_OLD = "anon_inode:[kvm-gmem]"
# linux/fcntl.h
_F_GET_SEALS = 1034
_F_SEAL_WRITE = 0x8
_F_SEAL_FUTURE_WRITE = 0x10
_SMALL_PAGE = 4096
_NO_MEMORY: Final = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


class _Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _vector = (ctypes.POINTER(_Iovec), ctypes.c_ulong)
    _function.argtypes = (ctypes.c_int, *_vector, *_vector, ctypes.c_ulong)
    _function.restype = ctypes.c_ssize_t


class MemoryFile:
    """A guest's memory file of `size` bytes, whose descriptor this object owns."""

    def __init__(self, fd: int, size: int) -> None:
        """FerryError(HANDOFF_REGIONS) where the file is shorter, HANDOFF_NO_FD where it is no writable memory file."""
        self._fd = fd
        self._size = size
        self._mapping: mmap.mmap | None = None
        self._stores = False
        self.is_guest_memfd = is_guest_memfd(fd)
        if not self.is_guest_memfd and not is_memfd(fd):
            raise FerryError(
                Reason.HANDOFF_NO_FD, "the descriptor handed over as memory is neither memfd nor guest_memfd"
            )
        _refuse_unless_writable(fd, seals=not self.is_guest_memfd)
        found = os.fstat(fd).st_size
        if found < size:
            raise FerryError(Reason.HANDOFF_REGIONS, f"the memory file has {found} bytes, and the regions {size}")
        if self.is_guest_memfd or is_huge(fd):
            self._mapping = _map(fd, size)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
            self._stores = self.is_guest_memfd and not _kernel_reaches(self._address)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def write(self, offset: int, data: bytes, start: int, length: int) -> None:
        """Write `length` bytes of `data` from `start` on.

        FerryError: NO_SPACE where the host has no memory left, VMM_FAILED where the VMM has made the file unwritable.
        """
        if self._stores:
            ctypes.memmove(self._address + offset, address_of(data, start), length)
            return
        try:
            if self._mapping is None:
                written = os.pwrite(self._fd, memoryview(data)[start : start + length], offset)
            else:
                written = _copy(_libc.process_vm_writev, address_of(data, start), self._address + offset, length)
        except OSError as error:
            raise self._failure("write", offset, error) from error
        if written < length:
            raise FerryError(Reason.NO_SPACE, f"only {written} of {length} bytes of guest memory were written")

    def fill(self, offset: int, length: int) -> None:
        """Make zeroes of what is a hole, and leave everything else as it is. Raises as `write`."""
        self._allocate("fill", _FALLOC_FL_KEEP_SIZE, offset, length)

    def punch(self, offset: int, length: int) -> None:
        """Make a range a hole: it reads as zeroes. Raises as `write`."""
        self._allocate("free", _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length)

    def close(self) -> None:
        """Let the file go. Twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # ctypes keeps an export of the mapping until it is collected: the mapping goes with this object.
            self._mapping = None
            self._stores = False
            os.close(fd)

    def _allocate(self, verb: str, mode: int, offset: int, length: int) -> None:
        while _libc.fallocate(self._fd, mode, offset, length):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise self._failure(verb, offset, OSError(number, os.strerror(number)))

    def _failure(self, verb: str, offset: int, error: OSError) -> FerryError:
        what = f"cannot {verb} guest memory at {offset}: {error.strerror}"
        # For a mapping EFAULT says that there is no page: no more huge pages, or the end of the file.
        missing = error.errno == errno.EFAULT and os.fstat(self._fd).st_size >= self._size
        if missing or error.errno in _NO_MEMORY:
            return FerryError(Reason.NO_SPACE, what)
        return FerryError(Reason.VMM_FAILED, f"{what}; the VMM has cut its memory file short, sealed or closed it")


def is_guest_memfd(fd: int) -> bool:
    """Say whether a descriptor is a guest_memfd."""
    return _link(fd) in (_GUEST_MEMFD, _GUEST_MEMFD_OLD)


def is_memfd(fd: int) -> bool:
    """Say whether a descriptor is a memfd (memfd_create(2)), on shmem or hugetlbfs.

    A file of that name elsewhere has no seals: on FUSE, say, where its owner could have the pager wait for ever.
    """
    return _link(fd).startswith("/memfd:") and stat.S_ISREG(os.fstat(fd).st_mode) and _seals(fd) is not None


def is_huge(fd: int) -> bool:
    """Say whether a memfd is made of huge pages, on hugetlbfs."""
    return os.fstatvfs(fd).f_bsize > _SMALL_PAGE


def forbid_shrinking(fd: int) -> None:
    """Make sure that a memfd keeps its size: a mapping of it would fault otherwise. FerryError(HANDOFF_REGIONS)."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        if (_seals(fd) or 0) & fcntl.F_SEAL_SHRINK:
            return
        raise FerryError(
            Reason.HANDOFF_REGIONS,
            "the userfault bitmap's memfd may be cut short: create it with MFD_ALLOW_SEALING",
        ) from error


def _refuse_unless_writable(fd: int, *, seals: bool) -> None:
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    sealed = seals and (_seals(fd) or 0) & (_F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE)
    if mode != os.O_RDWR or sealed:
        raise FerryError(Reason.HANDOFF_NO_FD, "the memory file was handed over read-only, or sealed against writes")


def _seals(fd: int) -> int | None:
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return None


def _link(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def _map(fd: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise FerryError(
            Reason.HANDOFF_NO_FD,
            f"the memory file cannot be mapped: {error}; create a guest_memfd with GUEST_MEMFD_FLAG_MMAP and "
            "_INIT_SHARED, and a memfd of huge pages with enough of them reserved",
        ) from error


def _kernel_reaches(address: int) -> bool:
    """Say whether the kernel copies to and from a mapping of this process."""
    byte = ctypes.create_string_buffer(1)
    try:
        return _copy(_libc.process_vm_readv, ctypes.addressof(byte), address, 1) == 1
    except OSError:
        return False


def _copy(call: Any, here: int, there: int, length: int) -> int:
    """Copy between two addresses of this process without a store of its own; return how many bytes were."""
    done: int = call(os.getpid(), _Iovec(here, length), 1, _Iovec(there, length), 1, 0)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done
