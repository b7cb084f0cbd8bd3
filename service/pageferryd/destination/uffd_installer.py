"""The userfaultfd installer: UFFDIO_COPY, ZEROPAGE, POISON and WAKE by page number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.installer import Placed
from pageferryd.linux.buffers import address_of
from pageferryd.linux.userfaultfd import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.destination.address_map import AddressMap
    from pageferryd.linux.userfaultfd import Userfaultfd

_PLACED = {
    Outcome.INSTALLED: Placed.DONE,
    Outcome.EXISTS: Placed.PRESENT,
    Outcome.RETRY: Placed.RETRY,
    Outcome.UNMAPPED: Placed.UNMAPPED,
}


class UffdInstaller:
    """Installs through the userfaultfd that the VMM handed over, and owns it."""

    def __init__(self, uffd: Userfaultfd, addresses: AddressMap) -> None:
        self._uffd = uffd
        self._addresses = addresses
        self._layout = addresses.layout

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        """Copy pages into place."""
        source = address_of(data, offset)
        if pages == 1:
            size, outcome = self._uffd.copy(self._addresses.address_of(first), source, PAGE_SIZE)
            return size // PAGE_SIZE, self._meaning(outcome)
        done = 0
        for address, count in self._addresses.spans(first, pages):
            size, outcome = self._uffd.copy(address, source + done * PAGE_SIZE, count * PAGE_SIZE)
            done += size // PAGE_SIZE
            if outcome is not Outcome.INSTALLED:
                return done, self._meaning(outcome)
        return done, Placed.DONE

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        """Map zeroes; hugetlbfs knows no zero page, so a whole huge page of zeroes is copied there."""
        granule = self._layout.granule(first)[1]
        if granule > 1:
            return self._zero_huge(first, pages, granule)
        return self._each_span(first, pages, self._uffd.zero)

    def _zero_huge(self, first: int, pages: int, granule: int) -> tuple[int, Placed]:
        zeroes = bytes(granule * PAGE_SIZE)
        done = 0
        while done < pages:
            placed, how = self.raw(first + done, granule, zeroes, 0)
            done += placed
            if how is not Placed.DONE:
                return done, how
        return done, Placed.DONE

    def touched_again(self, first: int, pages: int) -> tuple[int, Placed]:
        """Offer zeroes, which the kernel takes only where nothing is."""
        placed, how = self.zero(first, pages)
        if how is Placed.PRESENT:
            self.wake(first, pages)
        return placed, how

    def poison(self, first: int, pages: int) -> tuple[int, Placed]:
        """Poison pages."""
        return self._each_span(first, pages, self._uffd.poison)

    def _each_span(
        self, first: int, pages: int, operate: Callable[[int, int], tuple[int, Outcome]]
    ) -> tuple[int, Placed]:
        done = 0
        for address, count in self._addresses.spans(first, pages):
            size, outcome = operate(address, count * PAGE_SIZE)
            done += size // PAGE_SIZE
            if outcome is not Outcome.INSTALLED:
                return done, self._meaning(outcome)
        return done, Placed.DONE

    def _meaning(self, outcome: Outcome) -> Placed:
        if outcome is Outcome.GONE:
            raise FerryError(Reason.VMM_GONE, "the VMM ended while its guest's memory was coming")
        return _PLACED[outcome]

    def let_through(self, first: int, pages: int) -> None:
        """Nothing: private pages are not in the mapping that the userfaultfd guards."""

    def given_away(self, first: int, pages: int) -> None:
        """Nothing: the kernel told of it because it has dropped them."""

    def wake(self, first: int, pages: int) -> None:
        """Wake who waits."""
        for address, count in self._addresses.spans(first, pages):
            self._uffd.wake(address, count * PAGE_SIZE)

    def release(self) -> None:
        """Unregister every range, then close."""
        for address, region in zip(self._addresses.addresses, self._layout.regions, strict=True):
            self._uffd.unregister(address, region.size)
        self._uffd.close()

    def abandon(self) -> None:
        """Close."""
        self._uffd.close()
