"""The placer: puts what arrived in place, page by page as the pager still wants it."""

from __future__ import annotations

from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.checksums import CHECKSUM_SIZE
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pager import Lane
from pageferryd.core.runs import OPAQUE, POISONED, PRIVATE, PRIVATE_ZERO, RAW, WITH_BYTES, ZERO, Run
from pageferryd.destination.answering import Answering
from pageferryd.destination.damage import Damage
from pageferryd.destination.door import Settled
from pageferryd.destination.exports import Exports
from pageferryd.destination.imports import Delivery, ImportDesk
from pageferryd.destination.installer import Placed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pageferry.v1 import page_pb2
    from pageferryd.core.demand import FaultTimes
    from pageferryd.core.pager import Pager
    from pageferryd.core.runs import Batch
    from pageferryd.destination.arrivals import ArrivalMap
    from pageferryd.destination.installer import Installer

SLICE_PAGES = 256
"""Most pages placed in one go: a fault waits at most that long for the event loop."""
FINE_SLICE_PAGES = 40
"""The same while faults come: half a push message, since each slice costs push a turn of the loop."""


_NAMES = {RAW: "raw", ZERO: "zero", POISONED: "poisoned", PRIVATE: "raw", PRIVATE_ZERO: "zero", OPAQUE: "raw"}
_COUNTED = {(kind, lane): (lane.value, name) for lane in Lane for kind, name in _NAMES.items()}
_HOW = {
    RAW: Settled.INSTALLED,
    ZERO: Settled.ZERO,
    POISONED: Settled.POISONED,
    PRIVATE: Settled.INSTALLED,
    PRIVATE_ZERO: Settled.ZERO,
    OPAQUE: Settled.INSTALLED,
}
_PRIVATE = frozenset({PRIVATE, PRIVATE_ZERO, OPAQUE})


class _Piece(NamedTuple):
    run: Run
    data: bytes
    offset: int
    lane: Lane
    checksums: int
    """Where those of its pages begin in `data`; 0 where they have none."""


class Placer(Answering):
    """Installs runs and tells the pager. What the kernel cannot take now is kept, in order, for `retry`.

    `drain` makes the doors deliver what is queued; `ended` gets the faults that an install has answered; `settled` is
    told of every run that is in place, where a door has to answer for it.
    """

    def __init__(
        self,
        pager: Pager,
        installer: Installer,
        arrivals: ArrivalMap,
        drain: Callable[[], None],
        ended: Callable[[list[FaultTimes]], None],
        clock: Callable[[], float],
        settled: Callable[[int, int, Settled], None] | None = None,
    ) -> None:
        super().__init__(pager, installer, clock, settled, deque())
        self._ended = ended
        self._arrivals = arrivals
        self._drain = drain
        self._backlog: deque[_Piece] = deque()
        self._retrying = False
        self.pages: Counter[tuple[str, str]] = Counter()
        """Pages placed, by lane and kind."""
        self.damage = Damage(pager)
        self.desk = ImportDesk(self._imported, self._refused)
        self.exports = Exports(pager.layout.page_count, self._take_bundle, self.desk.has_room)

    @property
    def checksum_mismatches(self) -> int:
        """Pages that came damaged and were fetched again."""
        return self.damage.mismatches

    @property
    def behind(self) -> bool:
        """Whether something that arrived waits for the kernel to take it, or for the VMM to import it."""
        return bool(self._backlog or self._unserved) or self.desk.full

    def place(self, batch: Batch, lane: Lane) -> None:
        """Place a small batch at once."""
        if len(batch.runs) == 1:
            self._place(_Piece(batch.runs[0], batch.message, batch.offset, lane, batch.checksums))
            if self._backlog or self._unserved:
                self.retry()
            return
        for _ in self.slices(batch, lane):
            pass

    def slices(self, batch: Batch, lane: Lane) -> Iterator[None]:
        """Place a batch; yields between slices, so that faults can be served meanwhile."""
        offset, checksums = batch.offset, batch.checksums
        size = FINE_SLICE_PAGES if self._pager.faults_come(self._clock()) else SLICE_PAGES
        placed = 0
        for run in batch.runs:
            for first in range(run.first, run.first + run.pages, size):
                pages = min(size, run.first + run.pages - first)
                raw = run.kind in WITH_BYTES
                self._place(_Piece(Run(first, pages, run.kind), batch.message, offset, lane, checksums if raw else 0))
                if raw:
                    offset += pages * PAGE_SIZE
                    checksums += pages * CHECKSUM_SIZE if checksums else 0
                placed += pages
                if placed >= size or self.desk.full:
                    placed = 0
                    yield
        if self._backlog or self._unserved:
            self.retry()

    def retry(self) -> bool:
        """Drain the doors and try again what the kernel could not take; return whether nothing is left."""
        if self._retrying:
            return False
        self._retrying = True
        try:
            self._drain()
            for _ in range(len(self._backlog)):
                self._place(self._backlog.popleft())
            for _ in range(len(self._unserved)):
                self._unserved.popleft()()
        finally:
            self._retrying = False
        return not self.behind

    def _place(self, piece: _Piece) -> None:
        run = piece.run
        wanted = self._pager.wanted(run)
        surplus = run.pages - sum(pages for _, pages in wanted)
        if surplus:
            self._pager.duplicate(surplus)
        for first, pages in self._intact(piece, wanted) if piece.checksums else wanted:
            offset = piece.offset
            if run.kind in WITH_BYTES:
                offset += (first - run.first) * PAGE_SIZE
            checksums = piece.checksums and piece.checksums + (first - run.first) * CHECKSUM_SIZE
            if run.kind in _PRIVATE:
                self._hand_out(Run(first, pages, run.kind), piece.data, offset, piece.lane)
                continue
            if self._uniform or self._pager.layout.granule(first)[1] == 1:
                self._put(Run(first, pages, run.kind), piece.data, offset, piece.lane, checksums)
                continue
            for start in self._staging.add(Run(first, pages, run.kind), piece.data, offset, checksums):
                self._put_granule(start, piece.lane)

    def _intact(self, piece: _Piece, wanted: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield what of the wanted pages is as it was at the source; granules are looked at when they are whole."""
        run = piece.run
        for first, pages in wanted:
            if run.kind == RAW and not self._uniform and self._pager.layout.granule(first)[1] > 1:
                yield first, pages
                continue
            at = first - run.first
            offset, checksums = piece.offset + at * PAGE_SIZE, piece.checksums + at * CHECKSUM_SIZE
            yield from self.damage.intact_in(first, pages, piece.data, offset, checksums)

    def _hand_out(self, run: Run, data: bytes, offset: int, lane: Lane) -> None:
        """Give private pages to the VMM, or have them exported for it; who touched their shared side gets zeroes."""
        self._mark_private(run.first, run.pages, lane)
        if run.kind == OPAQUE:
            self._ask_for(run)
        else:
            self._pager.duplicate(self.desk.deliver(run, data, offset, lane))

    def _mark_private(self, first: int, pages: int, lane: Lane) -> None:
        self.private.add(first, pages)
        self._blank(first, pages, lane)

    def _blank(self, first: int, pages: int, lane: Lane) -> None:
        """Pages of one region are zero on their shared side, so whoever waits for that need not wait for them."""
        if not self._uniform:
            for start in self._staging.blank(first, pages):
                self._put_granule(start, lane)
        if self.touched_shared:
            self.touched_before(first, pages)

    def _ask_for(self, run: Run) -> None:
        """Have opaque pages exported, but for those that the VMM was given before."""
        for page in range(run.first, run.first + run.pages):
            if page in self.desk:
                self._pager.duplicate(1)
            else:
                self.exports.add(page, urgent=self._pager.waits_for(page))

    def _take_bundle(self, bundle: page_pb2.PageBundle) -> None:
        """Deliver a bundle, unless the guest has moved on from all of it."""
        wanted = [page for page in bundle.pages if self._pager.wanted(Run(page, 1, OPAQUE))]
        self._pager.duplicate(len(bundle.pages) - len(wanted))
        if wanted:
            for page in wanted:
                self._mark_private(page, 1, Lane.DEMAND)
            delivery = Delivery(tuple(bundle.pages), bundle.payload, bundle.metadata, bundle.stream, bundle.epoch)
            waited_for = any(self._pager.waits_for(page) for page in wanted)
            self.desk.deliver_bundle(delivery, wanted, Lane.DEMAND if waited_for else Lane.PUSH)

    def _imported(self, run: Run, lane: Lane) -> None:
        """The VMM has a private page in the guest."""
        self.exports.wake()
        if self._pager.wanted(run):
            self._installer.let_through(run.first, run.pages)
            self._note(run, lane)

    def _refused(self, page: int) -> None:
        """The VMM could not import a private page."""
        self.exports.wake()
        self._pager.not_installed(page, 1)

    def _put(self, run: Run, data: bytes, offset: int, lane: Lane, checksums: int = 0) -> None:
        """Install a run of missing pages, to its end or to what the kernel cannot take now."""
        first, left = run.first, run.pages
        while left:
            done, how = self._install(Run(first, left, run.kind), data, offset)
            if done:
                self._note(Run(first, done, run.kind), lane)
                first, left = first + done, left - done
                offset += done * PAGE_SIZE if run.kind == RAW else 0
            if how is Placed.DONE:
                return
            if how is Placed.RETRY:
                rest = checksums and checksums + (first - run.first) * CHECKSUM_SIZE
                self._backlog.append(_Piece(Run(first, left, run.kind), data, offset, lane, rest))
                return
            skipped = self._skip(Run(first, left, run.kind), how, lane)
            first, left = first + skipped, left - skipped
            offset += skipped * PAGE_SIZE if run.kind == RAW else 0

    def _put_granule(self, start: int, lane: Lane) -> None:
        """Install a granule whose last page has come, whole; what is private of it stays as missing as it is."""
        whole = self._staging.whole(start)
        if whole is None:
            return
        first, pages, kind = whole.run
        if whole.checksums:
            damaged = self.damage.damaged_in(first, pages, whole.data, 0, whole.checksums, 0)
            for page in damaged:
                self._staging.take_back(page)
            if damaged:
                return
        _, how = self._install(whole.run, whole.data, 0)
        if how is Placed.RETRY:
            self._unserved.append(partial(self._put_granule, start, lane))
            return
        self._staging.finish(start)
        if how is Placed.PRESENT:
            self._installer.wake(first, pages)
        for shared, length in list(self._missing_shared(first, pages)):
            if how is Placed.UNMAPPED:
                self._give_up(shared, length)
            else:
                self._note(Run(shared, length, kind), lane)

    def _note(self, run: Run, lane: Lane) -> None:
        now = self._clock()
        self.pages[_COUNTED[run.kind, lane]] += run.pages
        if run.kind == POISONED:
            ended = self._pager.poisoned(run, now)
        else:
            ended = self._pager.installed(run, lane, now)
            self._arrivals.note(run.first, run.pages, lane)
        self._tell(run.first, run.pages, _HOW[run.kind])
        if ended:
            self._ended(ended)

    def _skip(self, run: Run, how: Placed, lane: Lane) -> int:
        """Settle the page that could not be placed; return how many pages that was."""
        pages = self._pager.layout.granule(run.first)[1]
        if how is Placed.PRESENT:
            self._installer.wake(run.first, pages)
            self._note(Run(run.first, pages, run.kind), lane)
        else:
            self._give_up(run.first, pages)
        return pages

    def _give_up(self, first: int, pages: int) -> None:
        """Nobody can touch pages any more, as after a discard."""
        self._ended(self._pager.discard(first, pages, self._clock()))
        self._tell(first, pages, Settled.ZERO)

    def partly_dropped(self, first: int, pages: int) -> list[FaultTimes]:
        """The guest gave pages away, or converts them, that are less than one granule; returns who waited for them.

        They are zero in the granule when that is installed; where it is, the kernel or the VMM has made them so. Poison
        is in place for all of a granule, and stays.
        """
        self.desk.drop(first, pages)
        self.exports.drop(first, pages)
        self.private.remove(first, pages)
        waited_for: list[FaultTimes] = []
        for start, length in list(self._pager.map.poisoned.absent_runs(first, pages)):
            waited_for += self._pager.discard(start, length, self._clock())
        self._blank(first, pages, Lane.PUSH)
        return waited_for

    def dropped(self, first: int, pages: int) -> None:
        """The guest gave pages away, or converts them: what is staged or delivered of them is worthless."""
        self._installer.given_away(first, pages)
        self.desk.drop(first, pages)
        self.exports.drop(first, pages)
        self.private.remove(first, pages)
        if not self._uniform:
            self._staging.drop(first, pages)
