"""Private pages on their way into a guest: delivered to its VMM, which imports them and reports how that ended."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.runs import OPAQUE, PRIVATE, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pageferryd.core.pager import Lane

MAX_UNREPORTED_PAGES = 1024
"""Pages that may be delivered and not reported before no more push is taken."""
MAX_UNREPORTED_BYTES = 64 << 20
"""Bytes of payload and metadata, likewise."""
MAX_FAILURES = 1000
"""Imports that may fail before the migration does: something is wrong with the VMM, and asking again is no remedy."""


class ImportEnd(Enum):
    """How an import ended."""

    DONE = "done"
    STALE = "stale"
    """The guest has moved on from this version of the page."""
    DUPLICATE = "duplicate"
    FAILED = "failed"


class Delivery(NamedTuple):
    """Private pages for the VMM to import whole: their payload, empty where they are zero or pending.

    Metadata, stream and epoch are those of a bundle that the source's VMM exported.
    """

    pages: tuple[int, ...]
    payload: bytes
    metadata: bytes = b""
    stream: int = 0
    epoch: int = 0


class _Delivered(NamedTuple):
    """One page of a delivery, and its share of the bytes."""

    delivery: Delivery
    kind: int
    lane: Lane
    size: int


class ImportDesk:
    """Deliveries whose end was not reported yet; they are delivered again to a VMM that connects again.

    `imported` is called for each page that is in the guest, `refused` for each whose import failed.
    """

    def __init__(self, imported: Callable[[Run, Lane], None], refused: Callable[[int], None]) -> None:
        self._imported = imported
        self._refused = refused
        self._pages: dict[int, _Delivered] = {}
        self._bytes = 0
        self._send: Callable[[Delivery], None] | None = None
        self._unread: Callable[[], int] = lambda: 0
        self._failures = 0.0

    def __contains__(self, page: int) -> bool:
        """Say whether the page was delivered, and its import not reported."""
        return page in self._pages

    @property
    def full(self) -> bool:
        """Whether as much is unreported as may be."""
        return not self.has_room(1)

    def has_room(self, pages: int, *, urgent: bool = False) -> bool:
        """Whether so many pages more may be delivered; those that the guest waits for have as much room again."""
        times = 2 if urgent else 1
        most = times * MAX_UNREPORTED_PAGES
        # A VMM may report what it has not read.
        return len(self._pages) + pages <= most > self._unread() and self._bytes < times * MAX_UNREPORTED_BYTES

    def deliver(self, run: Run, data: bytes, offset: int, lane: Lane) -> int:
        """Take private pages for the VMM; return how many of them it has been given before."""
        size = PAGE_SIZE if run.kind == PRIVATE else 0
        repeated = 0
        for index in range(run.pages):
            page = run.first + index
            if page in self._pages:
                repeated += 1
                continue
            start = offset + index * size
            self._hand_out(Delivery((page,), data[start : start + size]), (page,), run.kind, lane)
        return repeated

    def deliver_bundle(self, delivery: Delivery, wanted: Sequence[int], lane: Lane) -> None:
        """Take a bundle for the VMM, whole, even where it was given some of its pages before.

        `wanted` are those of its pages whose import matters: the guest has not moved on from them.
        """
        self._hand_out(delivery, wanted, OPAQUE, lane)

    def _hand_out(self, delivery: Delivery, pages: Sequence[int], kind: int, lane: Lane) -> None:
        size = (len(delivery.payload) + len(delivery.metadata)) // len(pages)
        for page in pages:
            # Behind what was delivered before it, for a VMM that connects again.
            self._forget(page)
            self._pages[page] = _Delivered(delivery, kind, lane, size)
            self._bytes += size
        if self._send is not None:
            self._send(delivery)

    def _forget(self, page: int) -> _Delivered | None:
        delivered = self._pages.pop(page, None)
        if delivered is not None:
            self._bytes -= delivered.size
        return delivered

    def _unreported(self, first: int, pages: int) -> list[int]:
        if pages > len(self._pages):
            return [page for page in self._pages if first <= page < first + pages]
        return [page for page in range(first, first + pages) if page in self._pages]

    def connect(self, send: Callable[[Delivery], None], unread: Callable[[], int] = lambda: 0) -> None:
        """Deliver to this stream from now on, beginning with everything that was not reported.

        `unread` tells how much of what it was sent the VMM has left unread.
        """
        self._send, self._unread = send, unread
        for delivery in {id(one.delivery): one.delivery for one in self._pages.values()}.values():
            send(delivery)

    def disconnect(self, send: Callable[[Delivery], None]) -> None:
        """The stream has ended, unless another one took its place."""
        if self._send == send:
            self._send, self._unread = None, lambda: 0

    def report(self, first: int, pages: int, end: ImportEnd) -> None:
        """Take the VMM's word. FerryError(VMM_FAILED) when too many failed."""
        # What was converted meanwhile is known no more, and its import was in vain: no harm.
        for page in self._unreported(first, pages):
            delivered = self._forget(page)
            if delivered is None:
                # Whoever was told of a page before it has changed what is delivered.
                continue
            if end is ImportEnd.FAILED:
                self._fail(page, delivered.delivery)
            else:
                self._imported(Run(page, 1, delivered.kind), delivered.lane)

    def _fail(self, page: int, delivery: Delivery) -> None:
        # A bundle fails as one, and counts as one.
        self._failures += 1 / len(delivery.pages)
        if self._failures > MAX_FAILURES:
            raise FerryError(Reason.VMM_FAILED, f"the VMM has refused {MAX_FAILURES} imports of private pages")
        self._refused(page)

    def drop(self, first: int, pages: int) -> None:
        """The guest converted pages, or gave them away: deliveries of them are worthless."""
        for page in self._unreported(first, pages):
            self._forget(page)
