"""How a VMM describes its guest's memory: regions in order, and where the bytes of each can be read."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 * 1024 * 1024


class VmmState(enum.Enum):
    """What a VMM is doing."""

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    """Started to receive a guest, which has not run here yet."""


@dataclass(frozen=True)
class ProcessMemory:
    """A region that is mapped into the VMM; `address` is where, in bytes."""

    address: int


@dataclass(frozen=True)
class MemfdMemory:
    """A region that is a piece of a memfd which the VMM holds open as `fd`; `offset` in bytes."""

    fd: int
    offset: int = 0


@dataclass(frozen=True)
class FileMemory:
    """A region that is a piece of the file at the absolute `path`; `offset` in bytes."""

    path: str
    offset: int = 0


Location = ProcessMemory | MemfdMemory | FileMemory


@dataclass(frozen=True)
class Region:
    """One contiguous range of guest-physical memory. Address and size in bytes, multiples of `page_size`.

    `page_size` is 4096, or the huge page size where hugetlbfs backs the region. `location` may be None only while
    the VMM is incoming.
    """

    guest_address: int
    size: int
    page_size: int = PAGE_SIZE
    location: Location | None = None


@dataclass(frozen=True)
class MemoryDescription:
    """The whole memory of a guest, and what its VMM is doing."""

    state: VmmState
    regions: Sequence[Region]
