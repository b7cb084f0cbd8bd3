"""What a process has mapped, and whether it is about to end: /proc/PID/maps, /proc/PID/stat."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

from pageferryd.linux.proc import mapping_lines


class Mapping(NamedTuple):
    """One mapping: its first and one past its last address, and what it is."""

    start: int
    end: int
    readable: bool
    private_anonymous: bool


def mappings(pid: int, start: int, end: int) -> list[Mapping]:
    """Return the mappings that the process has between two addresses, in order. FerryError where it cannot be known."""
    found = map(_parse, mapping_lines(pid))
    return [one for one in found if one.start < end and one.end > start]


def is_mapped(found: list[Mapping], start: int, end: int) -> bool:
    """Say whether readable mappings, in order, cover all addresses from `start` to `end`."""
    for one in found:
        if one.start <= start < one.end and one.readable:
            start = one.end
    return start >= end


def is_dying(pid: int) -> bool:
    """Say whether the process has ended, is ending or was told to by SIGKILL."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    # The name in parentheses may hold anything; state is field 3 of proc_pid_stat(5), flags 9, pending signals 31.
    fields = content[content.rindex(b")") + 2 :].split()
    flags, pending = int(fields[9 - 3]), int(fields[31 - 3])
    return bool(flags & _PF_EXITING or pending >> (signal.SIGKILL - 1) & 1)


_PF_EXITING = 0x4  # include/linux/sched.h


def _parse(line: str) -> Mapping:
    addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
    start, _, end = addresses.partition("-")
    return Mapping(int(start, 16), int(end, 16), permissions[0] == "r", permissions[3] == "p" and inode == "0")
