"""A guest with private pages: what each must hold, the two sides of its memory, and the thread that works on it."""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass

from pageferry.errors import FerryError, Reason
from pageferry.guests.control import LISTED_FINDINGS, Verification
from pageferry.guests.pattern import Pattern
from pageferry.guests.process.plan import Order, Plan, Progress
from pageferry.guests.process.worker import Worker
from pageferry.vmm import Backing, GuestMemory
from pageferry.vmm.regions import PAGE_SIZE

ZEROES = bytes(PAGE_SIZE)
ZERO = -1
"""The version of a page that was converted, or never used."""
STEADY = 4
"""Of 16 pages this one stays private."""
_MADV_REMOVE = 9


@dataclass
class Book:
    """The guest's own knowledge: the version of each page, and which are private. It is all of the device state."""

    seed: int
    versions: list[int]
    private: list[bool]

    def __post_init__(self) -> None:
        self._pattern = Pattern(self.seed, 0)

    @classmethod
    def fresh(cls, seed: int, pages: int) -> Book:
        """Half of the pages are private, in runs and alone; every seventh of these was never used, nor were others."""
        private = [page % 16 < 6 or page % 5 == 0 for page in range(pages)]
        versions = [ZERO if page % 7 == 3 else 0 for page in range(pages)]
        return cls(seed, versions, private)

    def content(self, page: int) -> bytes:
        version = self.versions[page]
        return ZEROES if version == ZERO else self._pattern.page(page, version)

    def explain(self, page: int, found: bytes) -> str:
        kind = "private" if self.private[page] else "shared"
        if self.versions[page] == ZERO:
            return f"{kind} page {page}: expected zeroes, found {found[:32].hex()}"
        return f"{kind} {self._pattern.explain(page, self.versions[page], found)}"

    def pack(self) -> bytes:
        return json.dumps([self.seed, self.versions, self.private]).encode()

    @classmethod
    def unpack(cls, state: bytes) -> Book:
        return cls(*json.loads(state))


class Sides:
    """The memory: a shared side that is mapped, and private pages that are the VMM's to keep.

    `fetch` is called for a private page that is not here; it returns when the page may be.
    """

    def __init__(self, shared: GuestMemory) -> None:
        self.shared = shared
        self.private: dict[int, bytearray] = {}
        self.converted: set[int] = set()
        """Pages of which nothing old may be imported any more."""
        self.lock = threading.Lock()
        """Held to look at the two above, and to change them."""
        self.fetch: Callable[[int], None] | None = None
        self.announce: Callable[[int, bool], None] | None = None
        """Tells the pager of a conversion; returns when it is known there."""

    def read(self, page: int, *, private: bool) -> bytes:
        return bytes(self._private(page)) if private else self.shared.read(page * PAGE_SIZE, PAGE_SIZE)

    def write(self, page: int, data: bytes, *, private: bool) -> None:
        if private:
            self._private(page)[:] = data
        else:
            self.shared.write(page * PAGE_SIZE, data)

    def _private(self, page: int) -> bytearray:
        while True:
            with self.lock:
                found, fetch = self.private.get(page), self.fetch
            if found is not None:
                return found
            if fetch is None:
                raise FerryError(Reason.INTERNAL, f"private page {page} is not here, and nobody brings it")
            fetch(page)

    def convert(self, page: int, *, private: bool) -> None:
        """The guest makes a page private, or shared: it is zero then."""
        with self.lock:
            self.converted.add(page)
            self.private.pop(page, None)
            announce = self.announce
        if announce is not None:
            announce(page, private)
        self.drop_shared(page)
        if private:
            with self.lock:
                self.private[page] = bytearray(PAGE_SIZE)

    def drop_shared(self, page: int) -> None:
        """Make the shared side of a page zero."""
        # Of a huge page the kernel drops nothing: it overwrites this part with zeroes, where it is there.
        memory = self.shared
        advice = mmap.MADV_DONTNEED if memory.backing is Backing.ANONYMOUS else _MADV_REMOVE
        assert memory.advise(page * PAGE_SIZE, PAGE_SIZE, advice) == 0


class ConfidentialWorker(Worker):
    """The vCPU: checks page after page as what it is, then rewrites or converts it."""

    def __init__(self, sides: Sides, book: Book, steps: int) -> None:
        pages = len(book.versions)
        super().__init__(sides.shared, Plan(book.seed, pages, pages, 0, Order.RANDOM), Progress(steps))
        self.book = book
        self._sides = sides

    def _step(self) -> None:
        page, book = self.plan.page_at(self.steps), self.book
        private = book.private[page]
        self._expect(page, private=private)
        if private:
            # A device looks at the other side of it.
            found = self._sides.read(page, private=False)
            if found != ZEROES:
                self._wrong(f"the shared side of private page {page} holds {found[:32].hex()}")
        if self.steps % 5 == 2 and page % 16 != STEADY:
            book.private[page], book.versions[page] = not private, ZERO
            self._sides.convert(page, private=not private)
            self._expect(page, private=not private)
        else:
            book.versions[page] += 1
            self._sides.write(page, book.content(page), private=private)
        self.steps += 1

    def _expect(self, page: int, *, private: bool) -> None:
        found = self._sides.read(page, private=private)
        if found != self.book.content(page):
            self._wrong(self.book.explain(page, found))

    def _wrong(self, what: str) -> None:
        self.errors += 1
        self._findings.append(what)


def check(sides: Sides, book: Book) -> Verification:
    """Look at every byte of both sides of a guest that stands still."""
    wrong = []
    for page, private in enumerate(book.private):
        found = sides.read(page, private=private)
        if found != book.content(page):
            wrong.append(book.explain(page, found))
        if private and sides.read(page, private=False) != ZEROES:
            wrong.append(f"the shared side of private page {page} is not zero")
    return Verification(len(book.private), len(wrong), wrong[:LISTED_FINDINGS])
