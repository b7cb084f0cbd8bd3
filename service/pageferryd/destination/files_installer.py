"""The memory files installer: write pages into the files that a VMM maps, which asks for each page itself.

A page of zeroes is left a hole; whoever answers for it makes it present first (`make_present`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.installer import Placed
from pageferryd.linux.memory_file import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pageferryd.core.layout import Layout

_WRITE_PAGES = 64
"""Pages of one write: so many are written again at most where the host runs out of memory."""


class FilesInstaller:
    """Installs into `files`: a memory file and where the region begins in it, one a region. It owns the files.

    It does not look whether a page is there already: whoever calls knows what is missing.
    """

    def __init__(self, layout: Layout, files: Sequence[tuple[MemoryFile, int]]) -> None:
        self._layout = layout
        self._files = files

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        """Write. Who waits is answered by the door."""
        done = 0
        for file, at, length in self._ranges(first, pages):
            for start in range(0, length, _WRITE_PAGES * PAGE_SIZE):
                size = min(_WRITE_PAGES * PAGE_SIZE, length - start)
                try:
                    file.write(at + start, data, offset + done * PAGE_SIZE, size)
                except FerryError as error:
                    if error.reason is not Reason.NO_SPACE or not done:
                        raise
                    return done, Placed.RETRY
                done += size // PAGE_SIZE
        return pages, Placed.DONE

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        """Nothing: what nobody wrote is zero."""
        self._layout.check(first, pages)
        return pages, Placed.DONE

    def poison(self, first: int, pages: int) -> tuple[int, Placed]:
        """Nothing: a file cannot hold an error. The door answers whoever asks for the page with one."""
        self._layout.check(first, pages)
        return pages, Placed.DONE

    def touched_again(self, first: int, pages: int) -> tuple[int, Placed]:
        """Say that they are there; where the VMM has punched them out, they are zero once they are made present."""
        self._layout.check(first, pages)
        return 0, Placed.PRESENT

    def let_through(self, first: int, pages: int) -> None:
        """Nothing: no access is kept out."""

    def given_away(self, first: int, pages: int) -> None:
        """Make them holes."""
        for file, at, length in self._ranges(first, pages):
            file.punch(at, length)

    def wake(self, first: int, pages: int) -> None:
        """Nothing: who waits is answered by the door."""

    def release(self) -> None:
        """Close the files; the VMM has its own descriptors of them."""
        for file, _ in self._files:
            file.close()

    def abandon(self) -> None:
        """Close the files."""
        self.release()

    def make_present(self, first: int, pages: int) -> None:
        """Make zeroes of holes, and leave all else as it is: only pages of a file can be mapped.

        FerryError: NO_SPACE where the host has no memory left, VMM_FAILED.
        """
        for file, at, length in self._ranges(first, pages):
            file.fill(at, length)

    def _ranges(self, first: int, pages: int) -> Iterator[tuple[MemoryFile, int, int]]:
        """Yield where the pages lie: file, offset in it, length; in bytes."""
        for piece in self._layout.pieces(first, pages):
            file, base = self._files[piece.region]
            yield file, base + piece.first * PAGE_SIZE, piece.pages * PAGE_SIZE
