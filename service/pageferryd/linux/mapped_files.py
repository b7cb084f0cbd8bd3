"""The files behind shared mappings of another process: /proc/PID/map_files, proc_pid_map_files(5)."""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

from pageferry.errors import FerryError, Reason
from pageferryd.linux.proc import mapping_lines

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class FilePiece(NamedTuple):
    """Part of a mapped file: a path that opens it while it is mapped, and offset and length of the part in bytes."""

    path: str
    offset: int
    size: int


def is_shared(pid: int, address: int) -> bool:
    """Say whether a mapping is shared, or private. FerryError as in `files_behind`."""
    for line in mapping_lines(pid):
        start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return line.split(maxsplit=2)[1][3] == "s"
    return False


def files_behind(pid: int, address: int, size: int) -> list[FilePiece]:
    """Return what is mapped there, in order: one piece a mapping. FerryError: VMM_GONE, PERMISSION_MISSING."""
    pieces = []
    for line in mapping_lines(pid):
        addresses, _, offset, *_ = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in addresses.split("-"))
        low, high = max(start, address), min(end, address + size)
        if low < high:
            path = f"/proc/{pid}/map_files/{start:x}-{end:x}"
            pieces.append(FilePiece(path, int(offset, 16) + low - start, high - low))
    return pieces


def punch_holes(pid: int, address: int, size: int) -> None:
    """Drop all pages of the files behind shared mappings, for whoever has them mapped.

    FerryError: VMM_GONE, PERMISSION_MISSING, VMM_FAILED where a file cannot have holes.
    """
    for piece in files_behind(pid, address, size):
        try:
            fd = os.open(piece.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) is gone, or moved its memory") from error
        except OSError as error:
            raise _refusal(pid, "map_files", error) from error
        try:
            if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, piece.offset, piece.size):
                number = ctypes.get_errno()
                raise FerryError(
                    Reason.VMM_FAILED,
                    f"the memory of the VMM (process {pid}) cannot be emptied: {os.strerror(number)}; put its memory "
                    "file on tmpfs or hugetlbfs",
                )
        finally:
            os.close(fd)


def _refusal(pid: int, name: str, error: OSError) -> FerryError:
    return FerryError(
        Reason.PERMISSION_MISSING,
        f"/proc/{pid}/{name} is not readable ({error.strerror}): run with CAP_SYS_PTRACE and CAP_SYS_ADMIN",
    )
