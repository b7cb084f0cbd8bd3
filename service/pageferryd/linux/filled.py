"""Which pages of another process's memory are there, so that a touch of them is no missing fault."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pageferryd.linux.holes import Extents, ProcessPages, file_extents
from pageferryd.linux.mapped_files import files_behind, is_shared
from pageferryd.linux.proc import looking_at

if TYPE_CHECKING:
    from collections.abc import Callable


def filled(pid: int, address: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges of addresses that hold pages, in memory or swapped out, in order; bytes.

    The memory is private and anonymous, or shared and of files as shmem and hugetlbfs have. FerryError: VMM_GONE,
    PERMISSION_MISSING.
    """
    with looking_at(pid, "mem"):
        if is_shared(pid, address):
            return _filled_files(pid, address, size)
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
            return _all(ProcessPages(pagemap.fileno()).extents, address, size)


def _filled_files(pid: int, address: int, size: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    at = address
    for piece in files_behind(pid, address, size):
        fd = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            shift = at - piece.offset
            extents = _all(lambda start, length, fd=fd: file_extents(fd, start, length), piece.offset, piece.size)  # type: ignore[misc]
            found += [(start + shift, end + shift) for start, end in extents]
        finally:
            os.close(fd)
        at += piece.size
    return found


def _all(look: Callable[[int, int], Extents], start: int, size: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    at, end = start, start + size
    while at < end:
        extents = look(at, end - at)
        if extents.end <= at:
            raise ProcessLookupError("the pages of the process cannot be looked at any more")
        found += extents.data
        at = extents.end
    return found
