"""Whose memory a userfaultfd watches. The kernel does not say, but two things can be seen without touching a page.

What both together prove: the addresses are watched in the process, and in whatever process the userfaultfd is of. Where
the kernel chooses addresses at random these are one, unless two processes have worked together to look alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pageferry.abi import userfaultfd as abi
from pageferryd.linux.proc import looking_at

# Letters of VmFlags in proc_pid_smaps(5): watched for missing pages, for minor faults.
_WATCHED: Final = frozenset({"um", "ui"})
_ATTEMPTS: Final = 100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def watched_in(pid: int, ranges: list[tuple[int, int]]) -> bool:
    """Say whether all of the ranges, (address, bytes), are watched by some userfaultfd in a process.

    FerryError: VMM_GONE, PERMISSION_MISSING.
    """
    spans = list(_watched_spans(pid))
    return all(_covered(spans, start, start + size) for start, size in ranges)


def watches(uffd: int, address: int, page_size: int) -> bool:
    """Say whether the memory at an address is watched in the process that a userfaultfd is of. It is left as it is.

    The kernel is asked to fill the page from where nothing can be read. It first looks for the page's place, and then
    fails to read: what it fails with tells how far it came.
    """
    with _unreadable() as source:
        for _ in range(_ATTEMPTS):
            argument = bytearray(abi.COPY.pack(address, source, page_size, 0, 0))
            try:
                fcntl.ioctl(uffd, abi.UFFDIO_COPY, argument)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    # ENOENT: nothing watched is there; ESRCH: the process has ended.
                    return error.errno in (errno.EFAULT, errno.EEXIST, errno.EINVAL)
    # It changes its mappings all the time, and so has some.
    return True


@contextlib.contextmanager
def _unreadable() -> Iterator[int]:
    """Give the address of a page that nobody can read, and that nothing else comes to meanwhile."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, mmap.PAGESIZE, 0, flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "cannot map a page")
    try:
        yield address
    finally:
        _libc.munmap(address, mmap.PAGESIZE)


def _watched_spans(pid: int) -> Iterator[tuple[int, int]]:
    start = end = 0
    with looking_at(pid, "smaps"), Path(f"/proc/{pid}/smaps").open(errors="surrogateescape") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if first == "VmFlags:":
                if _WATCHED & set(rest.split()):
                    yield start, end
            elif not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))


def _covered(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    for low, high in spans:
        if low <= start < high:
            start = high
    return start >= end
