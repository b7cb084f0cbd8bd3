"""Put small mappings of another process back together: MADV_COLLAPSE through process_madvise(2), Linux 6.1.

A guest's memory that came page by page is mapped by page tables of 4 KiB entries; as huge pages it costs fewer of them,
and fewer TLB misses. All of this is a bonus: where the kernel refuses, the guest runs on as it is. It needs
CAP_SYS_NICE and the right to trace the process, and whole 2 MiB of memory that no userfaultfd watches any more.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import structlog

from pageferry.errors import FerryError
from pageferryd.linux.pidfd import PidFd

_log = structlog.get_logger(__name__)

HUGE: Final = 2 << 20
_NR_PROCESS_MADVISE: Final = 440  # the same on every architecture (asm-generic/unistd.h)
_MADV_POPULATE_WRITE: Final = 23
_MADV_COLLAPSE: Final = 25
_LONGEST_PAUSE: Final = 0.02
_ROUNDS: Final = 3
# A piece with a pinned page, say. Whoever has many of them is not worth the work.
_MAX_SKIPPED: Final = 64
_PASSING: Final = frozenset({errno.EAGAIN, errno.EBUSY})
_BIG: Final = frozenset({"AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb"})


class _Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint)
_syscall.restype = ctypes.c_long
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Touched:
    """Has the kernel touch a huge page, which it then takes for the piece that is collapsed next, if it can.

    The first touch costs a machine that is itself a virtual one some milliseconds, for which the guest would stand.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pin = ctypes.c_char.from_buffer(self._memory)
        self._page = -(-ctypes.addressof(self._pin) // HUGE) * HUGE
        _madvise(self._page, HUGE, mmap.MADV_HUGEPAGE)

    def touch(self) -> None:
        """Touch it, and give it back; where there is none, the collapse itself will tell."""
        _madvise(self._page, HUGE, _MADV_POPULATE_WRITE)
        _madvise(self._page, HUGE, mmap.MADV_DONTNEED)

    def close(self) -> None:
        del self._pin
        self._memory.close()


def collapse(pid: int, spans: Iterable[tuple[int, int]]) -> int:
    """Map whole 2 MiB of the (address, bytes) spans of a process by huge pages; return bytes that were not before.

    One piece at a time: who touches that meanwhile waits until it is copied, and in between the process runs as long
    undisturbed. Blocks for some milliseconds a piece, without the interpreter's lock. Never fails: what the kernel
    refuses stays as it is.
    """
    spans = list(spans)
    before = big_bytes(pid, spans)
    try:
        process = PidFd(pid)
    except FerryError as error:
        _log.info("memory_not_collapsed", pid=pid, detail=error.message)
        return 0
    with process, closing(_Touched()) as touched:
        refusals = {_collapse(process.fileno(), list(_pieces(span)), touched) for span in spans} - {0}
    if refusals:
        _log.info("memory_not_collapsed", pid=pid, detail=", ".join(map(os.strerror, sorted(refusals))))
    return max(0, big_bytes(pid, spans) - before)


def _collapse(pidfd: int, pieces: Sequence[int], touched: _Touched) -> int:
    """Collapse pieces up to the first that cannot be; return the errno of what was left, or 0.

    Pieces that are in use just now are tried again behind all others.
    """
    for _ in range(_ROUNDS):
        refusal, pieces = _collapse_once(pidfd, pieces, touched)
        if refusal not in _PASSING:
            break
    return refusal


def _collapse_once(pidfd: int, pieces: Sequence[int], touched: _Touched) -> tuple[int, Sequence[int]]:
    """Return the last errno and the pieces that were skipped for it."""
    refusal = 0
    skipped: list[int] = []
    for at, piece in enumerate(pieces):
        touched.touch()
        began = time.monotonic()
        number = _advise(pidfd, piece)
        if number in _PASSING:
            refusal = number
            skipped.append(piece)
            if len(skipped) == _MAX_SKIPPED:
                break
        elif number:
            return number, ()
        if at + 1 < len(pieces):
            time.sleep(min(time.monotonic() - began, _LONGEST_PAUSE))
    return refusal, skipped


def _advise(pidfd: int, piece: int) -> int:
    """Collapse one piece; return 0, or the errno."""
    vector = _Iovec(piece, HUGE)
    done = _syscall(_NR_PROCESS_MADVISE, pidfd, ctypes.addressof(vector), 1, _MADV_COLLAPSE, 0)
    return ctypes.get_errno() if done < 0 else 0


def _pieces(span: tuple[int, int]) -> Iterator[int]:
    """Yield the address of each aligned 2 MiB that lies within a span."""
    address, length = span
    yield from range(-(-address // HUGE) * HUGE, address + length - HUGE + 1, HUGE)


def big_bytes(pid: int, spans: Iterable[tuple[int, int]]) -> int:
    """Return how many bytes of the (address, bytes) spans of a process are mapped by huge pages; 0 of one that is gone.

    The kernel counts by mapping: of one that lies in the spans by a part, at most that part is counted.
    """
    spans = list(spans)
    total = overlap = big = 0
    try:
        with Path(f"/proc/{pid}/smaps").open() as smaps:
            for line in smaps:
                name, _, rest = line.partition(":")
                if name in _BIG:
                    big += int(rest.split()[0]) << 10
                elif " " in name:
                    total += min(big, overlap)
                    big, overlap = 0, _overlap(name.split()[0], spans)
    except OSError as error:
        _log.info("memory_maps_unreadable", pid=pid, detail=str(error))
        return 0
    return total + min(big, overlap)


def _overlap(mapping: str, spans: Iterable[tuple[int, int]]) -> int:
    start, end = (int(part, 16) for part in mapping.split("-"))
    return sum(max(0, min(end, address + length) - max(start, address)) for address, length in spans)
