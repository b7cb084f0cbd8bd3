"""One guest's memory as its source serves it: who may read it, since when, and until when."""

from __future__ import annotations

import hmac
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.page_set import PageSet
from pageferryd.core.runs import OPAQUE, POISONED, PRIVATE, RAW, WITH_BYTES, Run
from pageferryd.core.sharing import mark_private
from pageferryd.source.memory import Collected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from pageferry.v1 import page_pb2
    from pageferryd.core.layout import Layout
    from pageferryd.source.memory import SourceMemory

    Export = Callable[[Sequence[int]], Awaitable[Sequence[page_pb2.PageBundle]]]

TOKEN_BYTES = 32
_MAX_MARKED = 4096
_KINDS = {RAW: "raw", PRIVATE: "raw", POISONED: "poisoned"}


class Access(Enum):
    """What may be read of the memory."""

    CLOSED = "closed"
    """Nothing yet: the guest still runs here, and what it would give is not final."""
    OPEN = "open"
    """Everything: the guest stands still for good."""
    RELEASED = "released"
    """Nothing any more: the destination has every page."""


class Served:
    """A guest's memory on offer to one destination. `completed` is called when that says it has every page.

    With `checksums` each page carries its own from here to where it is installed.
    """

    def __init__(
        self,
        migration_id: str,
        token: bytes,
        destination_name: str,
        memory: SourceMemory,
        layout: Layout,
        completed: Callable[[], None],
        *,
        checksums: bool = False,
    ) -> None:
        self.migration_id = migration_id
        self.destination_name = destination_name
        self.layout = layout
        self.checksums = checksums
        self.access = Access.CLOSED
        self.private = PageSet(layout.page_count)
        """Pages that are private to the guest: they cross as such."""
        self.pages: Counter[tuple[str, str]] = Counter()
        """Pages sent, by lane and kind."""
        self.fetched_at = float("-inf")
        """When the demand lane was last answered, by the event loop's clock."""
        self.bytes: Counter[str] = Counter()
        """Bytes of pages sent, by lane."""
        self._export: Export | None = None
        self._token = token
        self._memory = memory
        self._completed = completed

    def check_token(self, token: bytes) -> None:
        """Raise FerryError(TOKEN_INVALID) unless the token is this migration's."""
        if not hmac.compare_digest(token, self._token):
            raise FerryError(Reason.TOKEN_INVALID, f"the token shown is not that of migration {self.migration_id}")

    def open(self, private: Iterable[tuple[int, int]] = (), export: Export | None = None) -> None:
        """Let the memory be read: the guest stands still.

        `private` are the runs of its private pages; with `export` these are opaque, and come in bundles from there.
        """
        for first, pages in private:
            self.layout.check(first, pages)
            self.private.add(first, pages)
        self._export = export
        self.access = Access.OPEN

    def readable(self) -> SourceMemory:
        """Return the memory, or raise FerryError(ILLEGAL_STATE) while it must not be read."""
        if self.access is Access.CLOSED:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.migration_id}: the guest still runs at the source")
        if self.access is Access.RELEASED:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.migration_id}: its memory was released")
        return self._memory

    def collect(self, first: int, pages: int, credit: int) -> Collected:
        """Read as SourceMemory.collect does, with private pages marked; opaque ones are named and not read."""
        memory = self.readable()
        if not self.private.count:
            return memory.collect(first, pages, credit)
        # Each page may become a run of its own.
        pages = min(pages, _MAX_MARKED)
        if self._export is not None:
            if first in self.private:
                end = self.private.next_absent(first, first + pages)
                return Collected([Run(first, end - first, OPAQUE)], [], end)
            pages = self.private.next_present(first, first + pages) - first
        collected = memory.collect(first, pages, credit)
        return collected._replace(runs=list(mark_private(collected.runs, self.private)))

    async def export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        """Have the VMM export opaque pages. FerryError: INVALID_ARGUMENT for others, or what the VMM says."""
        self.readable()
        for page in pages:
            self.layout.check(page, 1)
        if self._export is None or any(page not in self.private for page in pages):
            raise FerryError(Reason.INVALID_ARGUMENT, f"migration {self.migration_id}: these pages are not opaque")
        bundles = await self._export(pages)
        if any(page not in self.private for bundle in bundles for page in bundle.pages):
            raise FerryError(
                Reason.VMM_FAILED, f"migration {self.migration_id}: the VMM exported a page that it did not list"
            )
        self.pages["demand", "raw"] += sum(len(bundle.pages) for bundle in bundles)
        self.bytes["demand"] += sum(len(bundle.payload) for bundle in bundles)
        return bundles

    def count(self, lane: str, runs: list[Run]) -> None:
        """Count what was sent."""
        for run in runs:
            if run.kind == OPAQUE:
                continue
            self.pages[lane, _KINDS.get(run.kind, "zero")] += run.pages
            if run.kind in WITH_BYTES:
                self.bytes[lane] += run.pages * PAGE_SIZE

    def complete(self, pages: int) -> None:
        """Every page is at the destination: let the memory go. Saying so twice is harmless."""
        if pages != self.layout.page_count:
            raise FerryError(
                Reason.INVALID_ARGUMENT,
                f"migration {self.migration_id}: {pages} of {self.layout.page_count} pages are no completion",
            )
        if self.access is Access.CLOSED:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.migration_id}: the guest still runs at the source")
        if self.access is Access.OPEN:
            # Where that fails nothing is let go, and the destination says so once more.
            self._completed()
            self.close()

    def close(self) -> None:
        """Let the memory go. Twice does nothing."""
        if self.access is not Access.RELEASED:
            self.access = Access.RELEASED
            self._memory.close()
