"""The userfault bitmap: one bit a page that KVM, or the VMM in its place, looks at; a set bit makes an access fault.

The form is that of KVM Userfault (`userfault_bitmap`, v3 of June 2025) and of Firecracker's branch for it: the bits of
all pages in order, least significant first in 64-bit words. The VMM sets them, before the hand-off; the pager clears
them, each after its page's bytes are in place.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from bitarray import bitarray
from bitarray.util import intervals

from pageferry.errors import FerryError, Reason
from pageferryd.linux.atomic import atomic_and
from pageferryd.linux.memory_file import forbid_shrinking, is_huge, is_memfd

_WORD_BITS = 64
_ALL = (1 << _WORD_BITS) - 1
_MANY_WORDS = 16


def bitmap_bytes(pages: int) -> int:
    """Return the size of a bitmap: whole words."""
    return -(-pages // _WORD_BITS) * 8


class UserfaultBitmap:
    """A bitmap in a memfd of the VMM, whose descriptor this object owns."""

    def __init__(self, fd: int, pages: int) -> None:
        """FerryError: HANDOFF_NO_FD where it is no memfd, HANDOFF_REGIONS where it has another size or may shrink."""
        if not is_memfd(fd) or is_huge(fd):
            # A hole in hugetlbfs may be one for good: looking at it would be SIGBUS.
            raise FerryError(
                Reason.HANDOFF_NO_FD, "the descriptor handed over as userfault bitmap is no memfd of small pages"
            )
        forbid_shrinking(fd)
        size, needed = os.fstat(fd).st_size, bitmap_bytes(pages)
        # A VMM may round up to its own pages; less would leave pages without a bit.
        if not needed <= size < needed + mmap.PAGESIZE:
            raise FerryError(
                Reason.HANDOFF_REGIONS, f"the userfault bitmap has {size} bytes; {pages} pages need {needed}"
            )
        self._and_word = atomic_and().word
        self._pages = pages
        self._mapping: mmap.mmap | None = _map(fd, needed)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._fd = fd

    def clear(self, first: int, pages: int) -> None:
        """Let accesses to a run of pages through. What was written to them before is seen by whoever sees the bits."""
        self._check(first, pages)
        stop = first + pages
        while first < stop:
            word, bit = divmod(first, _WORD_BITS)
            count = min(_WORD_BITS - bit, stop - first)
            self._and_word(self._address + 8 * word, _ALL & ~(((1 << count) - 1) << bit))
            first += count
            words = (stop - first) // _WORD_BITS
            if words >= _MANY_WORDS:
                # Nothing of a whole word is kept, so that a store does; it stays behind the barrier above.
                ctypes.memset(self._address + first // 8, 0, words * 8)
                first += words * _WORD_BITS

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def clear_runs(self) -> list[tuple[int, int]]:
        """Return the runs of pages, (first, length), whose accesses are let through."""
        self._check(0, 1)
        missing = bitarray(endian="little")
        missing.frombytes(ctypes.string_at(self._address, bitmap_bytes(self._pages)))
        del missing[self._pages :]
        return [(start, stop - start) for value, start, stop in intervals(missing) if not value]

    def is_set(self, page: int) -> bool:
        """Say whether an access to the page still faults."""
        self._check(page, 1)
        return bool(ctypes.c_uint8.from_address(self._address + page // 8).value >> page % 8 & 1)

    def close(self) -> None:
        """Let it go. Twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._mapping = None
            os.close(fd)

    def _check(self, first: int, pages: int) -> None:
        """Never touch what is not the bitmap: that would be the end of every guest's pager."""
        if self._mapping is None or first < 0 or pages < 0 or first + pages > self._pages:
            raise IndexError(f"the userfault bitmap has no bits for {pages} pages from {first} on, or is closed")


def _map(fd: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise FerryError(Reason.HANDOFF_NO_FD, f"the userfault bitmap cannot be mapped for writing: {error}") from error
