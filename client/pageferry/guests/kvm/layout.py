"""Where things lie in the guest's memory, and the page tables that say so to its processor.

Guest-physical memory begins at 0: two unused pages, the code, the page tables, the data pages, and the last eighth,
which nobody ever touches: real holes, which have to arrive as zeroes. Code and data are mapped at their physical
addresses; the two unused pages leave their linear addresses to what the program shares with the VMM.
"""

from __future__ import annotations

import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.program import CODE, PAGE_SIZE, REPORT_ADDRESS, STATUS_ADDRESS

SMALLEST: Final = 64 * PAGE_SIZE
LARGEST: Final = 32 << 30
"""A processor without CPUID has 36 physical address bits, and the page of the status lies behind the memory."""

_CODE_PAGE: Final = 2
_TABLES_PAGE: Final = 3
_ENTRIES: Final = 512
_UNUSED_SHARE: Final = 8
_HLT: Final = b"\xf4"

# Bits of a page-table entry: Intel SDM volume 3, 4.5. Accessed and dirty are set at once, so that the processor never
# writes to the tables, and they can be compared byte for byte.
_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
_READ_ONLY: Final = _PRESENT | _USER | _ACCESSED
_READ_WRITE: Final = _READ_ONLY | _WRITABLE | _DIRTY


@dataclass(frozen=True)
class Layout:
    """The layout of a guest's memory of `size` bytes."""

    size: int

    @classmethod
    def of(cls, size: int) -> Layout:
        """Return the layout of `size` bytes."""
        if size % PAGE_SIZE or not SMALLEST <= size <= LARGEST:
            raise FerryError(
                Reason.INVALID_ARGUMENT,
                f"guest memory of {size} bytes: choose a multiple of {PAGE_SIZE} from {SMALLEST} to {LARGEST}",
            )
        return cls(size)

    @property
    def pages(self) -> int:
        """All pages of the memory."""
        return self.size // PAGE_SIZE

    @property
    def entry(self) -> int:
        """Address of the program."""
        return _CODE_PAGE * PAGE_SIZE

    @property
    def root_table(self) -> int:
        """Physical address of the top page table, for CR3."""
        return _TABLES_PAGE * PAGE_SIZE

    @property
    def first_data_page(self) -> int:
        """Number of the page behind the page tables."""
        return _TABLES_PAGE + 2 + self._directories + self._leaf_tables

    @property
    def data_pages(self) -> int:
        """How many pages the program works on."""
        return self.pages - self.pages // _UNUSED_SHARE - self.first_data_page

    @property
    def data_address(self) -> int:
        """Address of the first data page."""
        return self.first_data_page * PAGE_SIZE

    @property
    def status_page(self) -> int:
        """Physical address of the page, no memory of the guest, to which the program stores its progress."""
        return self.size

    @property
    def report_page(self) -> int:
        """Physical address at which a store of the program is a report. Nothing lies there."""
        return self.size + PAGE_SIZE

    def fixed_part(self) -> bytes:
        """Return the code and the page tables, which never change; they begin at `entry`."""
        return CODE.ljust(PAGE_SIZE, _HLT) + b"".join(self._tables())

    def _tables(self) -> Iterator[bytes]:
        directory_pointers = _TABLES_PAGE + 1
        directories = directory_pointers + 1
        leaves = directories + self._directories
        yield _table([directory_pointers * PAGE_SIZE | _READ_WRITE])
        yield _table([(directories + index) * PAGE_SIZE | _READ_WRITE for index in range(self._directories)])
        yield _table([(leaves + index) * PAGE_SIZE | _READ_WRITE for index in range(self._leaf_tables)])
        yield _table(self._leaf_entries())

    def _leaf_entries(self) -> list[int]:
        entries = [0] * self.first_data_page
        entries[STATUS_ADDRESS // PAGE_SIZE] = self.status_page | _READ_WRITE
        entries[REPORT_ADDRESS // PAGE_SIZE] = self.report_page | _READ_WRITE
        entries[_CODE_PAGE] = self.entry | _READ_ONLY
        data_end = self.data_address + self.data_pages * PAGE_SIZE
        entries.extend(range(self.data_address | _READ_WRITE, data_end | _READ_WRITE, PAGE_SIZE))
        return entries

    @property
    def _leaf_tables(self) -> int:
        return -(-self.pages // _ENTRIES)

    @property
    def _directories(self) -> int:
        return -(-self._leaf_tables // _ENTRIES)


def _table(entries: list[int]) -> bytes:
    """Return the entries, filled up to whole tables."""
    table = array.array("Q", entries).tobytes()
    return table + bytes(-len(table) % PAGE_SIZE)
