"""The userfault bitmap: which pages of a guest are still missing, in memory that its VMM and its pager share.

One bit a page of 4 KiB in the flat order of all regions, the least significant first, in 64-bit words. A set bit means
that the page faults. The VMM sets all bits before the hand-off. From then on only the pager changes them: it clears a
page's bit once the page's bytes are in place, and never sets one.
"""

from __future__ import annotations

import os

from pageferry.errors import FerryError, Reason
from pageferry.vmm.mapping import MappedMemory

_WORD_BITS = 64


class UserfaultBitmap:
    """A bitmap for `pages` pages in a memfd of its own, all set. The bits behind the last page stay clear."""

    def __init__(self, pages: int) -> None:
        if pages <= 0:
            raise FerryError(Reason.INVALID_ARGUMENT, f"a userfault bitmap for {pages} pages: there is none to watch")
        self.pages = pages
        self.size = -(-pages // _WORD_BITS) * _WORD_BITS // 8
        self.memfd = os.memfd_create("userfault-bitmap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.memfd, self.size)
            self._map = MappedMemory(self.size, self.memfd)
        except (OSError, FerryError) as error:
            os.close(self.memfd)
            raise FerryError(Reason.NO_SPACE, f"cannot make a userfault bitmap for {pages} pages: {error}") from error
        self.set_all()

    @property
    def address(self) -> int:
        """Where it is mapped, for a KVM that reads it itself."""
        return self._map.address

    def set_all(self) -> None:
        """Say that every page is missing. Only before the hand-off: later it would undo what the pager did."""
        self._map.write(0, ((1 << self.pages) - 1).to_bytes(self.size, "little"))

    def is_set(self, page: int) -> bool:
        """Tell whether a page is missing. IndexError where there is no such page."""
        self._check(page, page + 1)
        return bool(self._map.read(page >> 3, 1)[0] >> (page & 7) & 1)

    def clear_run_around(self, page: int, first: int, end: int) -> tuple[int, int]:
        """Return the first page and the end of the longest run of present pages that holds `page`, in [first, end).

        An empty run at `page` when it is missing itself.
        """
        if not first <= page < end:
            raise IndexError(f"page {page} is not among {first}..{end - 1}")
        bits = self._bits(first, end)
        above = bits >> page - first
        if above & 1:
            return page, page
        below = bits & (1 << page - first) - 1
        return first + below.bit_length(), (page + _trailing_zeroes(above) if above else end)

    def set_runs(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return the runs of missing pages in [first, end), in order, each as its first page and its end."""
        runs = []
        bits, at = self._bits(first, end), first
        while bits:
            skipped = _trailing_zeroes(bits)
            bits >>= skipped
            length = _trailing_zeroes(~bits)
            runs.append((at + skipped, at + skipped + length))
            bits >>= length
            at += skipped + length
        return runs

    def close(self) -> None:
        """Let the mapping and the descriptor go. A second call does nothing."""
        if self.memfd >= 0:
            self._map.close()
            os.close(self.memfd)
            self.memfd = -1

    def _bits(self, first: int, end: int) -> int:
        """Return the bits of [first, end) as a number, that of `first` the lowest."""
        self._check(first, end)
        low = first >> 3
        bits = int.from_bytes(self._map.read(low, (end + 7 >> 3) - low), "little") >> (first & 7)
        return bits & (1 << end - first) - 1

    def _check(self, first: int, end: int) -> None:
        if not 0 <= first < end <= self.pages:
            raise IndexError(f"pages {first}..{end - 1} are not among the {self.pages} of the bitmap")


def _trailing_zeroes(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
