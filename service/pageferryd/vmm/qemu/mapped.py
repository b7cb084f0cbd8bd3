"""What QEMU has mapped, as far as it may be guest RAM: /proc/PID/smaps, proc_pid_smaps(5)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from pageferryd.linux.proc import looking_at


@dataclass(frozen=True)
class Mapped:
    """One mapping: its first and one past its last address, its rights (`rw-p`), what backs it, its VmFlags."""

    start: int
    end: int
    rights: str
    inode: int
    flags: frozenset[str]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.end - self.start

    @property
    def is_shared(self) -> bool:
        """Whether stores go to a file, or to memory that others may have mapped too."""
        return self.rights[3] == "s"

    @property
    def is_anonymous(self) -> bool:
        """Whether it is private memory with no file behind it."""
        return not self.is_shared and self.inode == 0


def mapped(pid: int) -> list[Mapped]:
    """Return all mappings of a process, in order. FerryError: VMM_GONE, PERMISSION_MISSING.

    The kernel walks the page tables for this: some 10 ms a GiB of resident memory in small pages.
    """
    found: list[Mapped] = []
    head: tuple[int, int, str, int] | None = None
    with looking_at(pid, "smaps"), _lines_of(pid) as lines:
        for line in lines:
            if line[0] in "0123456789abcdef":
                head = _head(line)
            elif line.startswith("VmFlags:") and head is not None:
                found.append(Mapped(*head, frozenset(line.split()[1:])))
    return found


def _lines_of(pid: int) -> TextIO:
    # The kernel masks no end of a line but this one in the names of files, which the VMM chooses.
    return Path(f"/proc/{pid}/smaps").open(errors="surrogateescape", newline="\n")


def whole(mappings: list[Mapped], start: int, size: int) -> Mapped | None:
    """Return what backs `size` bytes from `start`; None unless mappings of one kind cover them without a gap."""
    first: Mapped | None = None
    reached = start
    for one in mappings:
        if not one.start <= reached < one.end:
            continue
        if first is None:
            first = one
        elif (one.rights, one.inode) != (first.rights, first.inode):
            return None
        reached = one.end
        if reached >= start + size:
            return first
    return None


def like_ram(mappings: list[Mapped]) -> list[Mapped]:
    """Return those that are made as QEMU makes a RAM block (util/mmap-alloc.c, softmmu/physmem.c there).

    Not inherited by a fork (`dc`, MADV_DONTFORK), and with a page behind that nobody may touch.
    """
    return [
        one
        for one, behind in pairwise(mappings)
        if "dc" in one.flags and one.rights[0] == "r" and behind.start == one.end and behind.rights[:3] == "---"
    ]


def _head(line: str) -> tuple[int, int, str, int]:
    addresses, rights, _, _, inode, *_ = line.split(maxsplit=5)
    start, _, end = addresses.partition("-")
    return int(start, 16), int(end, 16), rights, int(inode)
