"""What this machine can give the demonstration: a kind of guest, and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pageferry.cli.units import parse_bytes
from pageferry.demo.guests import Kind
from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing

_MIB: Final = 1 << 20
USUAL_MEMORY: Final = 512 * _MIB
LEAST_MEMORY: Final = 64 * _MIB
# The guest is there twice while it crosses; the rest is for four Python processes and their buffers.
_COPIES: Final = 2
_RESERVE: Final = 768 * _MIB


BACKINGS: Final = (Backing.ANONYMOUS, Backing.SHMEM, Backing.GUEST_MEMFD)


@dataclass(frozen=True)
class Memory:
    """What the person wants of the guest's memory: its size in bytes, and what backs it. None leaves it to us."""

    size: int | None = None
    backing: Backing | None = None


def parse_memory(text: str) -> Memory:
    """Return what `256M`, `guest_memfd` or `guest_memfd:256M` mean. Raises ValueError for anything else."""
    word, colon, size = text.strip().partition(":")
    for backing in BACKINGS:
        if word == backing.value:
            return Memory(parse_bytes(size) if colon else None, backing)
    try:
        return Memory(parse_bytes(text))
    except ValueError as error:
        names = ", ".join(backing.value for backing in BACKINGS)
        raise ValueError(f"{error}; or what backs it ({names}), or both, as in guest_memfd:256M") from None


def choose_kind(device: Path = Path("/dev/kvm")) -> Kind:
    """Return the virtual machine where this user may open /dev/kvm, else the process."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return Kind.PROCESS
    return Kind.KVM


def kind_for(kind: Kind | None, backing: Backing | None) -> Kind:
    """Return the kind of guest that was asked for, or the one that fits this machine and what backs its memory."""
    if backing is not Backing.GUEST_MEMFD:
        return kind or choose_kind()
    if kind is Kind.PROCESS:
        raise FerryError(Reason.INVALID_ARGUMENT, "memory of guest_memfd is made by KVM: it needs --guest kvm")
    return Kind.KVM


def choose_memory(available: int) -> int:
    """Return how many bytes the guest gets on a machine with `available` free ones: 512 MiB, or halves of it."""
    memory = USUAL_MEMORY
    while memory > LEAST_MEMORY and available < _COPIES * memory + _RESERVE:
        memory //= 2
    return memory


def available_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that new processes can have: of the machine, or of the container around us if that is less."""
    return min(_free_of_machine(proc), _free_of_container(cgroup))


def _free_of_machine(proc: Path) -> int:
    for line in proc.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return USUAL_MEMORY


def _free_of_container(cgroup: Path) -> int:
    """Return what the limit of a version 2 cgroup leaves; where there is none, as much as one can think of."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)
