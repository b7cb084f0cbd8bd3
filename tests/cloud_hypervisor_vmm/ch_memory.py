"""Guest memory as Cloud Hypervisor has it: one zone in one memfd, in two regions, below and above a hole."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pageferry.vmm.mapping import MappedMemory

HIGH = 1 << 32
"""Where the second region begins in the guest."""


@dataclass(frozen=True)
class RamMapping:
    slot: int
    gpa: int
    size: int
    file_offset: int

    def as_json(self) -> dict[str, object]:
        return {
            "slot": self.slot,
            "gpa": self.gpa,
            "size": self.size,
            "file_offset": self.file_offset,
            "zone_id": "mem0",
            "virtio_mem": False,
        }


class TwoRegions:
    """Flat memory over both regions, as the process guest's worker needs it. Bytes."""

    def __init__(self, mappings: list[RamMapping], files: dict[int, int]) -> None:
        self.mappings = mappings
        self.files = files
        self.maps = [MappedMemory(one.file_offset + one.size, files[one.slot]) for one in mappings]
        self.size = sum(one.size for one in mappings)

    @classmethod
    def made(cls, size: int) -> TwoRegions:
        low = size // 4 * 3
        fd = os.memfd_create("ch_ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls([RamMapping(0, 0, low, 0), RamMapping(3, HIGH, size - low, low)], {0: fd, 3: os.dup(fd)})

    def address(self, index: int) -> int:
        """Where a region is mapped."""
        return self.maps[index].address + self.mappings[index].file_offset

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self.maps[index].read(at, size) for index, at, size in self._pieces(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        for index, at, size in self._pieces(offset, len(data)):
            self.maps[index].write(at, data[done : done + size])
            done += size

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        found, start = [], 0
        for index, one in enumerate(self.mappings):
            first, stop = max(offset, start), min(offset + length, start + one.size)
            if first < stop:
                found.append((index, one.file_offset + first - start, stop - first))
            start += one.size
        return found
