"""Put small mappings of another process back together: MADV_COLLAPSE through process_madvise(2), Linux 6.1.

A guest's memory that came page by page is mapped by page tables of 4 KiB entries; as huge pages it costs fewer of them,
and fewer TLB misses. All of this is a bonus: where the kernel refuses, the guest runs on as it is. It needs
CAP_SYS_NICE and the right to trace the process, and whole 2 MiB of memory that no userfaultfd watches any more.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import structlog

from pageferry.errors import FerryError
from pageferryd.linux.pidfd import PidFd

_log = structlog.get_logger(__name__)

HUGE: Final = 2 << 20
_NR_PROCESS_MADVISE: Final = 440  # the same on every architecture (asm-generic/unistd.h)
_MADV_COLLAPSE: Final = 25
# One call holds the process's mappings for a while: 32 MiB at a time.
_PIECES_A_CALL: Final = 16
_ROUNDS: Final = 3
# A piece with a pinned page, say. Whoever has many of them is not worth the work.
_MAX_SKIPPED: Final = 64
_PASSING: Final = frozenset({errno.EAGAIN, errno.EBUSY})
_BIG: Final = frozenset({"AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb"})


class _Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint)
_syscall.restype = ctypes.c_long


def collapse(pid: int, spans: Iterable[tuple[int, int]]) -> int:
    """Map whole 2 MiB of the (address, bytes) spans of a process by huge pages; return bytes that were not before.

    Blocks for as long as copying the memory takes, without the interpreter's lock. Never fails: what the kernel
    refuses stays as it is.
    """
    spans = list(spans)
    before = big_bytes(pid, spans)
    try:
        process = PidFd(pid)
    except FerryError as error:
        _log.info("memory_not_collapsed", pid=pid, detail=error.message)
        return 0
    try:
        refusals = {_collapse(process.fileno(), list(_pieces(span))) for span in spans} - {0}
    finally:
        process.close()
    if refusals:
        _log.info("memory_not_collapsed", pid=pid, detail=", ".join(map(os.strerror, sorted(refusals))))
    return max(0, big_bytes(pid, spans) - before)


def _collapse(pidfd: int, pieces: Sequence[int]) -> int:
    """Collapse pieces up to the first that cannot be; return the errno of what was left, or 0.

    Pieces that are in use just now are tried again behind all others.
    """
    for _ in range(_ROUNDS):
        refusal, pieces = _collapse_once(pidfd, pieces)
        if refusal not in _PASSING:
            break
    return refusal


def _collapse_once(pidfd: int, pieces: Sequence[int]) -> tuple[int, Sequence[int]]:
    """Return the last errno and the pieces that were skipped for it."""
    at, refusal = 0, 0
    skipped: list[int] = []
    while at < len(pieces) and len(skipped) < _MAX_SKIPPED:
        done, number = _advise(pidfd, pieces[at : at + _PIECES_A_CALL])
        at += done
        if number in _PASSING:
            refusal = number
            skipped.append(pieces[at])
            at += 1
        elif number:
            return number, ()
    return refusal, skipped


def _advise(pidfd: int, pieces: Sequence[int]) -> tuple[int, int]:
    """Return how many pieces the kernel has taken, and the errno of the next one, or 0."""
    vector = (_Iovec * len(pieces))(*[_Iovec(address, HUGE) for address in pieces])
    done = _syscall(_NR_PROCESS_MADVISE, pidfd, ctypes.addressof(vector), len(pieces), _MADV_COLLAPSE, 0)
    if done < 0:
        return 0, ctypes.get_errno()
    # Short of all, the kernel tells no reason: the next call begins with the piece that it did not take.
    return int(done) // HUGE, 0


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
