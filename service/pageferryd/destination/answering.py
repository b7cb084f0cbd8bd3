"""Answers to accesses whose pages need no fetching: they are there, zero or poisoned, or private to the guest.

Private pages have two sides. The private one is imported by the VMM; the shared one is the VMM's mapping, and zero. A
huge page behind a userfaultfd is installed whole, so its shared side has zeroes where its private pages are, and the
bytes of all others: an access to any of them waits until the last of these has come.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.page_set import PageSet
from pageferryd.core.pager import Answer
from pageferryd.core.runs import POISONED, RAW, ZERO, Run
from pageferryd.destination.door import Settled
from pageferryd.destination.installer import Placed
from pageferryd.destination.staging import Staging

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator

    from pageferryd.core.pager import Pager
    from pageferryd.destination.installer import Installer

_log = structlog.get_logger(__name__)


class Answering:
    """Serves accesses through the installer, and tells doors by `settled`.

    What the kernel cannot take now is put into `unserved`, to be called again.
    """

    def __init__(
        self,
        pager: Pager,
        installer: Installer,
        clock: Callable[[], float],
        settled: Callable[[int, int, Settled], None] | None,
        unserved: deque[Callable[[], None]],
    ) -> None:
        self._pager = pager
        self._installer = installer
        self._clock = clock
        self._settled = settled
        self._unserved = unserved
        self._uniform = pager.layout.uniform
        self._staging = Staging(pager.layout)
        self.private = PageSet(pager.layout.page_count)
        """Pages that are private to the guest."""
        self.touched_shared: set[int] = set()
        """Pages that somebody waits for at a door that sees only accesses to shared memory."""
        self.shared_accesses = 0
        """Accesses to the shared side of private pages: they got zeroes, as KVM gives."""

    def carry_out(self, answer: Answer, page: int) -> None:
        """Do what the pager's answer to a fault asks for at once."""
        if answer is Answer.ZERO:
            self.serve_zero(page)
        elif answer is Answer.WAKE:
            self.serve_present(page)
        elif answer is Answer.POISON:
            self.serve_poison(page)

    # The shared side of private pages

    def waits_for(self, page: int) -> int | None:
        """Return the page that an access to the shared side of `page` waits for: itself, or another of its granule.

        None where nothing is to come, and zeroes will do: all of the granule is private.
        """
        if self._uniform:
            return None if page in self.private else page
        first, pages = self._pager.layout.granule(page)
        if pages == 1:
            return None if page in self.private else page
        known: int | None = None
        for start, length in self.private.absent_runs(first, pages):
            stop = start + length
            for candidate in (self._staging.to_come(start, stop), self._pager.map.settled.next_absent(start, stop)):
                if candidate < stop and candidate not in self._pager.map.settled:
                    return candidate
            there = self._pager.map.discarded.next_absent(start, stop)
            if known is None or there < stop:
                known = there if there < stop else start
        return known

    def touched(self, page: int, now: float, raised: float) -> Answer:
        """Take an access to the shared side of a page that a door saw at `raised`; what it asks for at once is done."""
        waited_for = self.waits_for(page)
        if waited_for is None:
            # Whether the VMM has imported it yet or not: this access is not what waits for that.
            self.serve_shared_side(page)
            return Answer.ZERO
        answer = self._pager.fault(waited_for, now, raised)
        if answer in (Answer.FETCH, Answer.JOINED):
            self.touched_shared.add(waited_for)
        else:
            self.carry_out(answer, waited_for)
        return answer

    def touched_before(self, first: int, pages: int) -> None:
        """Serve who waited for the shared side of pages which turned out to be private, or were given away."""
        for page in [page for page in self.touched_shared if first <= page < first + pages]:
            self.touched_shared.discard(page)
            now = self._clock()
            self.touched(page, now, now)

    def serve_shared_side(self, page: int) -> None:
        """Give zeroes to who touched the shared side of a private page, where its granule has no other pages."""
        self.shared_accesses += 1
        self._fill_shared_side(page)

    def _fill_shared_side(self, page: int) -> None:
        # Nothing is told of the page itself: its private side may be on its way yet.
        first, pages = self._pager.layout.granule(page)
        _, how = self._install(Run(first, pages, ZERO), b"", 0)
        if how is Placed.PRESENT:
            self._installer.wake(first, pages)
        elif how is Placed.RETRY:
            self._unserved.append(partial(self._fill_shared_side, page))

    def _missing_shared(self, first: int, pages: int) -> Iterator[tuple[int, int]]:
        """Yield the missing runs of a granule that are not private, as (first, pages)."""
        for start, length in self._pager.map.missing_runs(first, pages):
            yield from self.private.absent_runs(start, length)

    # Pages that are settled

    def serve_zero(self, page: int) -> None:
        """Give zeroes to who waits for a page that was discarded."""
        first, pages = self._pager.layout.granule(page)
        if pages > 1 and self._has_content(first, pages):
            # It is zero there, or will be when that is installed; a door of its own may ask for it before.
            self._installer.let_through(page, 1)
            self._tell(page, 1, Settled.ZERO)
            return
        _, how = self._install(Run(first, pages, ZERO), b"", 0)
        if how is Placed.RETRY:
            self._unserved.append(partial(self.serve_zero, page))
            return
        if how is Placed.PRESENT:
            self._installer.wake(first, pages)
        self._tell(page, 1, Settled.ZERO)

    def _has_content(self, first: int, pages: int) -> bool:
        """Say whether a granule has a page that is neither private nor given away."""
        discarded = self._pager.map.discarded
        return any(not discarded.holds_all(*run) for run in self.private.absent_runs(first, pages))

    def serve_poison(self, page: int) -> None:
        """Give a memory error to who touched a page that the source could not read."""
        first, pages = self._pager.layout.granule(page)
        _, how = self._install(Run(first, pages, POISONED), b"", 0)
        if how is not Placed.DONE:
            self._installer.wake(first, pages)
        self._tell(page, 1, Settled.POISONED)

    def serve_present(self, page: int) -> None:
        """Let who touched a page go on that was installed meanwhile."""
        if page in self.private:
            # It is in the VMM's hands; its shared side is another page.
            self._installer.let_through(page, 1)
            self._tell(page, 1, Settled.PRESENT)
            return
        first, pages = self._pager.layout.granule(page)
        try:
            _, how = self._installer.touched_again(first, pages)
        except FerryError as error:
            how = wait_for_memory(error)
        if how is Placed.RETRY:
            self._unserved.append(partial(self.serve_present, page))
            return
        if how is Placed.DONE:
            for start, length in list(self.private.absent_runs(first, pages)):
                self._pager.discard(start, length, self._clock())
        self._tell(page, 1, Settled.ZERO if how is Placed.DONE else Settled.PRESENT)

    # How

    def _install(self, run: Run, data: bytes, offset: int) -> tuple[int, Placed]:
        try:
            if run.kind == RAW:
                return self._installer.raw(run.first, run.pages, data, offset)
            if run.kind == ZERO:
                return self._installer.zero(run.first, run.pages)
            return self._installer.poison(run.first, run.pages)
        except FerryError as error:
            return 0, wait_for_memory(error)

    def _tell(self, first: int, pages: int, how: Settled) -> None:
        if self._settled is not None:
            self._settled(first, pages, how)


def wait_for_memory(error: FerryError) -> Placed:
    """A host without memory now may have some later: the guest waits, and loses nothing. Any other error is raised."""
    if error.reason is not Reason.NO_SPACE:
        raise error
    _log.warning("no_memory_for_guest", detail=error.message)
    return Placed.RETRY
