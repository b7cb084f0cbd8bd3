"""Where memory holds nothing, found without reading it: SEEK_DATA of files, PAGEMAP_SCAN and pagemap of processes."""

from __future__ import annotations

import array
import errno
import fcntl
import os
from struct import Struct
from typing import NamedTuple

from pageferryd.core.layout import PAGE_SIZE

MOST_EXTENTS = 1024
"""Most extents that one look-up returns."""


class Extents(NamedTuple):
    """What a look-up found: the (start, end) of data in order, in bytes; all else before `end` reads as zeroes.

    `end` lies before the end of the range asked for when there are too many extents for one look-up.
    """

    data: list[tuple[int, int]]
    end: int


def file_extents(fd: int, offset: int, length: int) -> Extents:
    """Find the data in a range of a file or memfd, which must not be beyond its end. Moves the file position."""
    data: list[tuple[int, int]] = []
    at, end = offset, offset + length
    while at < end:
        if len(data) == MOST_EXTENTS:
            return Extents(data, at)
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        if start >= end:
            break
        at = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        data.append((start, at))
    return Extents(data, end)


# struct pm_scan_arg and struct page_region of linux/fs.h: size, flags, start, end, walk_end (out), vec, vec_len,
# max_pages, category_inverted, category_mask, category_anyof_mask, return_mask; and start, end, categories.
_SCAN = Struct("=12Q")
_WALK_END_AT = 4 * 8
_REGION_WORDS = 3
_PAGEMAP_SCAN = 3 << 30 | _SCAN.size << 16 | ord("f") << 8 | 16
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4

# An entry of /proc/PID/pagemap.
_ENTRY_SIZE = 8
_ENTRY_HOLDS_DATA = 1 << 63 | 1 << 62  # present, swapped
_MOST_ENTRIES = 8192


class ProcessPages:
    """Which pages of a process's private anonymous memory were ever filled, by its /proc/PID/pagemap.

    Of memory that is shared or backed by a file nothing can be said: its pages may be filled but not mapped. A page
    that was only read is data, too. An answer may be given for a process that is about to be gone, whose pages all
    seem never filled: see ProcessReader.
    """

    def __init__(self, pagemap: int) -> None:
        """Use `pagemap`, an open descriptor which remains the caller's."""
        self._pagemap = pagemap
        self._found = array.array("Q", bytes(8 * _REGION_WORDS * MOST_EXTENTS))
        self._scans = self._try_scan()

    def extents(self, address: int, length: int) -> Extents:
        """Find the data in a range of pages."""
        return self._scan(address, length) if self._scans else self._read_entries(address, length)

    def _try_scan(self) -> bool:
        try:
            self._scan(0, PAGE_SIZE)
        except OSError:
            # ENOTTY before Linux 6.7. Whatever else is wrong, reading the entries will say it again.
            return False
        return True

    def _scan(self, address: int, length: int) -> Extents:
        data = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED
        end, (vector, _) = address + length, self._found.buffer_info()
        argument = bytearray(_SCAN.pack(_SCAN.size, 0, address, end, 0, vector, MOST_EXTENTS, 0, 0, 0, data, data))
        count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
        words = self._found[: _REGION_WORDS * count].tolist()
        walked = int.from_bytes(argument[_WALK_END_AT : _WALK_END_AT + 8], "little")
        return Extents(_merged(list(zip(words[::_REGION_WORDS], words[1::_REGION_WORDS], strict=True))), walked)

    def _read_entries(self, address: int, length: int) -> Extents:
        pages = min(length // PAGE_SIZE, _MOST_ENTRIES)
        content = os.pread(self._pagemap, pages * _ENTRY_SIZE, address // PAGE_SIZE * _ENTRY_SIZE)
        entries = memoryview(content).cast("Q").tolist()
        filled = [index for index, entry in enumerate(entries) if entry & _ENTRY_HOLDS_DATA]
        starts = [address + index * PAGE_SIZE for index in filled]
        return Extents(_merged([(start, start + PAGE_SIZE) for start in starts]), address + len(entries) * PAGE_SIZE)


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join extents that touch: the kernel parts pages in memory from pages in swap."""
    merged: list[tuple[int, int]] = []
    for start, end in extents:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
