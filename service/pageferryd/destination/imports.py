"""Private pages on their way into a guest: delivered to its VMM, which imports them and reports how that ended."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.runs import OPAQUE, PRIVATE, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.core.pager import Lane

MAX_UNREPORTED_PAGES = 1024
"""Pages that may be delivered and not reported before no more push is taken."""
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
    delivery: Delivery
    kind: int
    lane: Lane


class ImportDesk:
    """Deliveries whose end was not reported yet; they are delivered again to a VMM that connects again.

    `imported` is called for each page that is in the guest, `refused` for each whose import failed.
    """

    def __init__(self, imported: Callable[[Run, Lane], None], refused: Callable[[int], None]) -> None:
        self._imported = imported
        self._refused = refused
        self._pages: dict[int, _Delivered] = {}
        self._send: Callable[[Delivery], None] | None = None
        self._failures = 0

    @property
    def full(self) -> bool:
        """Whether as much is unreported as may be."""
        return len(self._pages) >= MAX_UNREPORTED_PAGES

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
            self._hand_out(Delivery((page,), data[start : start + size]), run.kind, lane)
        return repeated

    def deliver_bundle(self, delivery: Delivery, lane: Lane) -> None:
        """Take a bundle for the VMM, whole, even where it was given some of its pages before."""
        self._hand_out(delivery, OPAQUE, lane)

    def _hand_out(self, delivery: Delivery, kind: int, lane: Lane) -> None:
        for page in delivery.pages:
            self._pages[page] = _Delivered(delivery, kind, lane)
        if self._send is not None:
            self._send(delivery)

    def connect(self, send: Callable[[Delivery], None]) -> None:
        """Deliver to this stream from now on, beginning with everything that was not reported."""
        self._send = send
        for delivery in {id(one.delivery): one.delivery for one in self._pages.values()}.values():
            send(delivery)

    def disconnect(self, send: Callable[[Delivery], None]) -> None:
        """The stream has ended, unless another one took its place."""
        if self._send == send:
            self._send = None

    def report(self, first: int, pages: int, end: ImportEnd) -> None:
        """Take the VMM's word. FerryError(VMM_FAILED) when too many failed."""
        # What was converted meanwhile is known no more, and its import was in vain: no harm.
        for page in [page for page in range(first, first + pages) if page in self._pages]:
            delivered = self._pages.pop(page)
            if end is ImportEnd.FAILED:
                self._fail(page)
            else:
                self._imported(Run(page, 1, delivered.kind), delivered.lane)

    def _fail(self, page: int) -> None:
        self._failures += 1
        if self._failures > MAX_FAILURES:
            raise FerryError(Reason.VMM_FAILED, f"the VMM has refused {self._failures} imports of private pages")
        self._refused(page)

    def drop(self, first: int, pages: int) -> None:
        """The guest converted pages, or gave them away: deliveries of them are worthless."""
        if self._pages:
            for page in [page for page in self._pages if first <= page < first + pages]:
                del self._pages[page]
