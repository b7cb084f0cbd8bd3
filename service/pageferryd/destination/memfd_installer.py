"""The memory file installer: write a page into the guest's memfd or guest_memfd, then clear its userfault bit.

The order matters: whoever sees the bit clear must see the page. Where the VMM has a userfaultfd over its own mapping of
the file as well, accesses through that find the page in the page cache and get it with UFFDIO_CONTINUE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.page_set import PageSet
from pageferryd.destination.installer import Placed
from pageferryd.linux.userfaultfd import Outcome

if TYPE_CHECKING:
    from pageferryd.destination.address_map import AddressMap
    from pageferryd.destination.userfault_bitmap import UserfaultBitmap
    from pageferryd.linux.memory_file import MemoryFile
    from pageferryd.linux.userfaultfd import Userfaultfd


class MemfdInstaller:
    """Installs through the memory file, and owns it with its bitmap and, where there is one, the userfaultfd.

    It does not look whether a page is there already: whoever calls knows what is missing.
    """

    def __init__(
        self, memory: MemoryFile, bitmap: UserfaultBitmap, addresses: AddressMap, uffd: Userfaultfd | None = None
    ) -> None:
        self._memory = memory
        self._bitmap = bitmap
        self._addresses = addresses
        self._layout = addresses.layout
        self._uffd = uffd
        self._poisoned = PageSet(self._layout.page_count)

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        """Write, clear the bits, wake."""
        self._cure(first, pages)
        self._memory.write(first * PAGE_SIZE, data, offset, pages * PAGE_SIZE)
        self._bitmap.clear(first, pages)
        if self._uffd is not None:
            if self._is_one(first, pages):
                self._map(first, pages)
            else:
                # Few of a run's pages are waited for: those fault once more, and find them in the file.
                self.wake(first, pages)
        return pages, Placed.DONE

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        """Clear the bits: a page of the file that nobody wrote is zero. One that somebody wrote stays as it is."""
        self._cure(first, pages)
        self._bitmap.clear(first, pages)
        if self._uffd is not None:
            if self._is_one(first, pages):
                self._map_filled(first, pages)
            else:
                self.wake(first, pages)
        return pages, Placed.DONE

    def poison(self, first: int, pages: int) -> tuple[int, Placed]:
        """Leave the bits set, so that each access of a vCPU asks again and is told; poison the VMM's own mapping."""
        self._poisoned.add(first, pages)
        if self._uffd is None:
            return pages, Placed.DONE
        done = 0
        for address, count in self._addresses.spans(first, pages):
            size, outcome = self._uffd.poison(address, count * PAGE_SIZE)
            done += size // PAGE_SIZE
            self._refuse_gone(outcome)
            if outcome is not Outcome.INSTALLED:
                return done, Placed.RETRY if outcome is Outcome.RETRY else Placed.PRESENT
        return pages, Placed.DONE

    def touched_again(self, first: int, pages: int) -> tuple[int, Placed]:
        """Clear the bits, which a VMM may have set once more, and map what is in the file."""
        self._bitmap.clear(first, pages)
        if self._uffd is None or self._map(first, pages):
            return 0, Placed.PRESENT
        # A hole: zeroes that were installed in a run with others, or pages that the VMM dropped.
        self._map_filled(first, pages)
        return pages, Placed.DONE

    def let_through(self, first: int, pages: int) -> None:
        """Clear the bits, which vCPUs' private accesses exit for, too."""
        self._bitmap.clear(first, pages)

    def given_away(self, first: int, pages: int) -> None:
        """Make them holes of the file, unless a userfaultfd told of it: then the kernel has."""
        if self._uffd is None:
            self._memory.punch(first * PAGE_SIZE, pages * PAGE_SIZE)

    def wake(self, first: int, pages: int) -> None:
        """Wake who waits through the VMM's own mapping."""
        if self._uffd is not None:
            for address, count in self._addresses.spans(first, pages):
                self._uffd.wake(address, count * PAGE_SIZE)

    def release(self) -> None:
        """Let every access through that a VMM made fault again, but to poisoned pages; unregister, and let all go."""
        for first, pages in self._poisoned.absent_runs(0, self._layout.page_count):
            self._bitmap.clear(first, pages)
        if self._uffd is not None:
            for address, region in zip(self._addresses.addresses, self._layout.regions, strict=True):
                self._uffd.unregister(address, region.size)
        self.abandon()

    def abandon(self) -> None:
        """Let everything go."""
        self._memory.close()
        self._bitmap.close()
        if self._uffd is not None:
            self._uffd.close()

    def _cure(self, first: int, pages: int) -> None:
        """Pages that were poisoned have become zero: the guest gave them away."""
        if self._poisoned:
            self._poisoned.remove(first, pages)

    def _is_one(self, first: int, pages: int) -> bool:
        return pages == 1 or pages == self._layout.granule(first)[1]

    def _map_filled(self, first: int, pages: int) -> None:
        """Map pages, of zeroes where the file has none."""
        self._memory.fill(first * PAGE_SIZE, pages * PAGE_SIZE)
        self._map(first, pages)

    def _map(self, first: int, pages: int) -> bool:
        """Map pages of the file in the VMM, and wake who waits for them; return False where the file has none."""
        assert self._uffd is not None
        in_file = True
        for address, count in self._addresses.spans(first, pages):
            _, outcome = self._uffd.resolve_minor(address, count * PAGE_SIZE)
            self._refuse_gone(outcome)
            if outcome is not Outcome.INSTALLED:
                # Mapped by somebody else, or not to be mapped right now: who waits looks again.
                self._uffd.wake(address, count * PAGE_SIZE)
            in_file &= outcome is not Outcome.UNMAPPED
        return in_file

    def _refuse_gone(self, outcome: Outcome) -> None:
        if outcome is Outcome.GONE:
            raise FerryError(Reason.VMM_GONE, "the VMM ended while its guest's memory was coming")
