"""Whether a process has a file in its hands: open to be read, or mapped.

That is what tells a VMM's own memory from a file that it merely knows the name of: the sidecar may open far more files
than the VMM may. They are compared by device and inode. The kernel's own numbers, of /proc/PID/fdinfo and
/proc/PID/maps, come first: asking for those runs no code of a file system that some user has written.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pageferry.errors import FerryError, Reason
from pageferryd.linux.proc import looking_at, mapping_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_FILES: Final = 65_536
"""Most descriptors of a process that are looked at."""


def holds_file(pid: int, fd: int) -> bool:
    """Say whether process `pid` has the file behind `fd`, an open descriptor here, open for reading or mapped.

    FerryError: VMM_GONE, PERMISSION_MISSING, INVALID_ARGUMENT where the process has more than MOST_FILES open.
    """
    return _has_open(pid, fd) or _has_mapped(pid, fd)


def may_read(fd: int) -> bool:
    """Say whether whoever opened a descriptor was let read the file: one of O_PATH or O_WRONLY says nothing of that."""
    return _may_read(_fdinfo(Path(f"/proc/self/fdinfo/{fd}"))[1])


def _has_open(pid: int, fd: int) -> bool:
    inode, _ = _fdinfo(Path(f"/proc/self/fdinfo/{fd}"))
    wanted = os.fstat(fd)
    for number in _numbers(pid):
        # One that was closed meanwhile is none.
        with looking_at(pid, "fdinfo"), contextlib.suppress(FileNotFoundError):
            found, flags = _fdinfo(Path(f"/proc/{pid}/fdinfo/{number}"))
            if found == inode and _may_read(flags) and _is(Path(f"/proc/{pid}/fd/{number}"), wanted):
                return True
    return False


def _numbers(pid: int) -> Iterator[str]:
    with looking_at(pid, "fd"), os.scandir(f"/proc/{pid}/fd") as entries:
        for count, entry in enumerate(entries):
            if count >= MOST_FILES:
                raise FerryError(
                    Reason.INVALID_ARGUMENT,
                    f"process {pid} has more than {MOST_FILES} files open: its memory is not looked for among them",
                )
            yield entry.name


def _has_mapped(pid: int, fd: int) -> bool:
    """A file can be mapped only by who may read it."""
    inode, _ = _fdinfo(Path(f"/proc/self/fdinfo/{fd}"))
    wanted = os.fstat(fd)
    device = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}"
    for line in mapping_lines(pid):
        addresses, _, _, on_device, number, *_ = line.split(maxsplit=5)
        if int(number) != inode:
            continue
        start, end = (int(part, 16) for part in addresses.split("-"))
        try:
            if _is(Path(f"/proc/{pid}/map_files/{start:x}-{end:x}"), wanted):
                return True
        except FileNotFoundError:
            continue
        except PermissionError:
            # It takes CAP_SYS_ADMIN to look there. Some file systems show other devices in maps: those are not found.
            if on_device == device:
                return True
    return False


def _is(path: Path, wanted: os.stat_result) -> bool:
    return os.path.samestat(path.stat(), wanted)


def _fdinfo(path: Path) -> tuple[int, int]:
    """Return inode and flags of an open file (proc_pid_fdinfo(5)); an inode of -1 before Linux 5.14."""
    told = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(told.get("ino", "-1")), int(told["flags"], 8)


def _may_read(flags: int) -> bool:
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_WRONLY
