"""The memory file installer: write a page into the guest's memfd or guest_memfd, then clear its userfault bit.

The order matters: whoever sees the bit clear must see the page. Where the VMM has a userfaultfd over its own mapping of
the file as well, accesses through that find the page in the page cache and get it with UFFDIO_CONTINUE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.installer import Placed
from pageferryd.linux.userfaultfd import Outcome

if TYPE_CHECKING:
    from pageferryd.destination.address_map import AddressMap
    from pageferryd.destination.userfault_bitmap import UserfaultBitmap
    from pageferryd.linux.memory_file import MemoryFile
    from pageferryd.linux.userfaultfd import Userfaultfd


class MemfdInstaller:
    """Installs through the memory file, and owns it with its bitmap and, where there is one, the userfaultfd."""

    def __init__(
        self, memory: MemoryFile, bitmap: UserfaultBitmap, addresses: AddressMap, uffd: Userfaultfd | None = None
    ) -> None:
        self._memory = memory
        self._bitmap = bitmap
        self._addresses = addresses
        self._uffd = uffd

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        """Write, clear the bits, wake."""
        self._memory.write(first * PAGE_SIZE, data, offset, pages * PAGE_SIZE)
        self._bitmap.clear(first, pages)
        self._map(first, pages)
        return pages, Placed.DONE

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        """Clear the bits: a page of the file that nobody wrote is zero."""
        self._bitmap.clear(first, pages)
        self._zero_mapped(first, pages)
        return pages, Placed.DONE

    def poison(self, first: int, pages: int) -> tuple[int, Placed]:
        """Leave the bits set, so that each access of a vCPU asks again and is told; poison the VMM's own mapping."""
        if self._uffd is not None:
            for address, count in self._addresses.spans(first, pages):
                self._check(self._uffd.poison(address, count * PAGE_SIZE)[1])
        return pages, Placed.DONE

    def touched_again(self, first: int, pages: int) -> tuple[int, Placed]:
        """Clear the bits, which a VMM may have set once more, and map what is in the file."""
        self._bitmap.clear(first, pages)
        self._map(first, pages, single=True)
        return 0, Placed.PRESENT

    def wake(self, first: int, pages: int) -> None:
        """Wake who waits through the VMM's own mapping."""
        if self._uffd is not None:
            for address, count in self._addresses.spans(first, pages):
                self._uffd.wake(address, count * PAGE_SIZE)

    def release(self) -> None:
        """Unregister the mapping, and let everything go."""
        if self._uffd is not None:
            layout = self._addresses.layout
            for address, region in zip(self._addresses.addresses, layout.regions, strict=True):
                self._uffd.unregister(address, region.size)
        self.abandon()

    def abandon(self) -> None:
        """Let everything go."""
        self._memory.close()
        self._bitmap.close()
        if self._uffd is not None:
            self._uffd.close()

    def _map(self, first: int, pages: int, *, single: bool = False) -> None:
        if self._uffd is None:
            return
        if pages > 1 and not single:
            # Few of a run's pages are waited for: those fault once more, and find them in the file.
            self.wake(first, pages)
            return
        for address, count in self._addresses.spans(first, pages):
            _, outcome = self._uffd.resolve_minor(address, count * PAGE_SIZE)
            self._check(outcome)
            if outcome is not Outcome.INSTALLED:
                self._uffd.wake(address, count * PAGE_SIZE)

    def _zero_mapped(self, first: int, pages: int) -> None:
        if self._uffd is None:
            return
        for address, count in self._addresses.spans(first, pages):
            _, outcome = self._uffd.zero(address, count * PAGE_SIZE)
            self._check(outcome)
            if outcome is not Outcome.INSTALLED:
                self._uffd.wake(address, count * PAGE_SIZE)

    def _check(self, outcome: Outcome) -> None:
        if outcome is Outcome.GONE:
            raise FerryError(Reason.VMM_GONE, "the VMM ended while its guest's memory was coming")
