"""The model VMM: attributes and private memory of each page, imports, conversions, and exits that are forwarded.

All pages are shared and absent at first. What a vCPU touches as private leaves it until the page was imported; all
other accesses go to the shared mapping, which a real userfaultfd guards.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from pageferry.v1 import fault_pb2
from pageferryd.core.layout import PAGE_SIZE

from .fault_client import FaultClient, Response
from .oracle import WORD, ZERO_PAGE, Change, Side, Ticks, Violation

T = TypeVar("T")
_IN_PLACE = (fault_pb2.OUTCOME_INSTALLED, fault_pb2.OUTCOME_SPURIOUS)


class ModelVmm:
    """The guest and its VMM. `content` is what each page holds at the source, `private` which pages are private."""

    def __init__(
        self,
        guarded: Any,
        content: Callable[[int], bytes],
        private: set[int],
        rng: random.Random,
        trace: Callable[[str], None],
        troubled: bool,
    ) -> None:
        self.guarded = guarded
        self.pages = guarded.layout.page_count
        self._rng = rng
        self._trace = trace
        self._troubled = troubled
        self.ticks = Ticks()
        self.is_private = [page in private for page in range(self.pages)]
        """What the guest takes each page for."""
        self._attribute = [False] * self.pages
        """What KVM has for it: true is private."""
        self._memory: dict[int, bytearray] = {}
        """The private side of pages whose attribute is private."""
        self._importable = [True] * self.pages
        self.given_up: dict[int, int] = {}
        """Pages whose deliveries are worthless, and how many streams there were then."""
        self._touched: set[int] = set()
        """Pages whose shared side may be there."""
        self.busy: set[int] = set()
        """Pages that are being converted or discarded."""
        self.shared = [Side(ZERO_PAGE if page in private else content(page)) for page in range(self.pages)]
        self.private = [Side(content(page)) for page in range(self.pages)]
        self.client: FaultClient
        self.released = False
        self._reports: set[asyncio.Task[None]] = set()
        self.counts = dict.fromkeys(("imports", "failed", "stale", "duplicate", "conversions", "discards", "exits"), 0)

    # Accesses

    async def access(self, page: int, word: bytes | None) -> None:
        """A vCPU reads a page, or writes its first word, as what the guest takes it for."""
        start = self.ticks.next()
        while True:
            if not self.is_private[page]:
                if self._attribute[page]:
                    # The exit of a page that is being converted.
                    await asyncio.sleep(0)
                    continue
                await self._access_shared(page, word, start, "vCPU")
                return
            if self._attribute[page]:
                self._access_private(page, word)
                return
            await self._exit(page)

    async def device_access(self, page: int, word: bytes | None) -> None:
        """A device reads or writes the shared side of a page, whatever the page is."""
        await self._access_shared(page, word, self.ticks.next(), "device")

    async def _access_shared(self, page: int, word: bytes | None, start: int, who: str) -> None:
        side = self.shared[page]
        self._touched.add(page)
        if word is None:
            seen = await _of(self.guarded.reading(page))
            self._trace(f"{who} read shared {page}: {seen[:WORD].hex()}")
            side.check(seen, start, self.ticks.next(), f"{who} reads shared page {page}")
            return
        change = side.write(word, start)
        await _of(self.guarded.writing(page, word))
        change.done(self.ticks.next())
        self._trace(f"{who} wrote shared {page}: {word.hex()}")

    def _access_private(self, page: int, word: bytes | None) -> None:
        now = self.ticks.next()
        side, memory = self.private[page], self._memory[page]
        if word is None:
            self._trace(f"vCPU read private {page}: {memory[:WORD].hex()}")
            side.check(bytes(memory), now, now, f"vCPU reads private page {page}")
            return
        memory[:WORD] = word
        side.write(word, now).done(now)
        self._trace(f"vCPU wrote private {page}: {word.hex()}")

    async def _exit(self, page: int) -> None:
        """KVM_EXIT_MEMORY_FAULT: the access is private and the attribute is not."""
        self.counts["exits"] += 1
        await asyncio.sleep(0)
        if self._rng.random() < 0.1:
            # Of many pages nothing is said of one: it exits again where that was not enough.
            stop = min(page + 1 + self._rng.randrange(4), self.guarded.layout.end_of_region(page))
            await self.client.fault(page, stop - page, private=True)
            return
        response = await self.client.fault(page, 1, private=True)
        if self._attribute[page] or not self.is_private[page] or page in self.busy:
            return
        if response is None:
            self._zero_unless_lost(page)
        elif response.outcome == fault_pb2.OUTCOME_ZERO:
            self.make_private_zero(page)
        elif response.outcome in _IN_PLACE and self._importable[page]:
            raise Violation(f"private page {page} is said to be in place ({response.outcome}), and was never delivered")
        elif response.outcome == fault_pb2.OUTCOME_REFUSED and not self.client.over:
            raise Violation(f"the fault on private page {page} was refused: {response.message}")

    def make_private_zero(self, page: int) -> None:
        self._trace(f"private {page} is zero")
        self._importable[page] = False
        self._make_private(page, ZERO_PAGE)

    def _zero_unless_lost(self, page: int) -> None:
        if self._importable[page]:
            raise Violation(f"the migration has ended, and private page {page} never came")
        self._make_private(page, ZERO_PAGE)

    def _make_private(self, page: int, content: bytes) -> None:
        self._memory[page] = bytearray(content)
        self._attribute[page] = True

    # Imports

    async def take(self, response: Response, stream: int) -> None:
        """A resolution came."""
        for _ in range(self._rng.randrange(3)):
            await asyncio.sleep(0)
        if response.outcome != fault_pb2.OUTCOME_DELIVERED:
            return
        page, pages = self.guarded.layout.run_at(response.guest_address, response.size)
        if pages != 1 or len(response.payload) not in (0, PAGE_SIZE):
            raise Violation(f"{pages} pages at {page} were delivered with {len(response.payload)} bytes")
        result = self._import(page, response.payload or ZERO_PAGE, stream)
        task = asyncio.create_task(self._report(page, result))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    def _import(self, page: int, content: bytes, stream: int) -> fault_pb2.ImportResult.ValueType:
        if page not in self.busy and self.given_up.get(page, stream) < stream:
            raise Violation(f"page {page} was delivered again on a stream that is younger than its conversion")
        if page in self.given_up:
            self.counts["stale"] += 1
            return fault_pb2.IMPORT_RESULT_STALE
        if not self._importable[page]:
            self.counts["duplicate"] += 1
            return fault_pb2.IMPORT_RESULT_DUPLICATE
        if self._troubled and self._rng.random() < 0.1:
            self.counts["failed"] += 1
            return fault_pb2.IMPORT_RESULT_FAILED
        self._trace(f"imported {page}: {content[:WORD].hex()}")
        self.counts["imports"] += 1
        self._importable[page] = False
        self._make_private(page, content)
        return fault_pb2.IMPORT_RESULT_DONE

    async def _report(self, page: int, result: fault_pb2.ImportResult.ValueType) -> None:
        for _ in range(self._rng.randrange(6)):
            await asyncio.sleep(0)
        self._trace(f"report {page}: {fault_pb2.ImportResult.Name(result)}")
        await self.client.report(page, result)

    async def reported(self) -> None:
        await asyncio.gather(*self._reports)

    # Conversions and discards

    async def convert(self, first: int, pages: int) -> None:
        """The guest converts pages of one kind: they are zero, and of the other."""
        run, private = range(first, first + pages), not self.is_private[first]
        self.counts["conversions"] += 1
        self._trace(f"converts {first}+{pages} to {'private' if private else 'shared'}")
        changes = self._begin_zero(run)
        early = self._rng.random() < 0.5
        if early:
            self._give_up(run)
        if not self.client.over:
            await self.client.convert(first, pages, private=private)
        if not early:
            self._give_up(run)
        if private or self._touched.intersection(run):
            await self._punch(first, pages)
        for page in run:
            if private:
                self._make_private(page, ZERO_PAGE)
            else:
                self._memory.pop(page, None)
                self._attribute[page] = False
            self.is_private[page] = private
        self._finish(run, changes)

    async def discard(self, first: int, pages: int) -> None:
        """The balloon gives pages back: both their sides are zero, and they stay what they are."""
        run = range(first, first + pages)
        self.counts["discards"] += 1
        self._trace(f"discards {first}+{pages}")
        changes = self._begin_zero(run)
        early = self._rng.random() < 0.5
        if early:
            self._give_up(run)
        await self.tell_of_discard(first, pages)
        await self._punch(first, pages)
        if not early:
            self._give_up(run)
        for page in run:
            if page in self._memory:
                self._memory[page][:] = ZERO_PAGE
        self._finish(run, changes)

    async def tell_of_discard(self, first: int, pages: int) -> None:
        """Nothing: the userfaultfd does."""

    async def _punch(self, first: int, pages: int) -> None:
        await _of(self.guarded.discarding(first, pages))

    def _give_up(self, run: range) -> None:
        for page in run:
            self.given_up[page] = self.client.streams
            self._importable[page] = False

    def _begin_zero(self, run: range) -> list[Change]:
        self.busy.update(run)
        now = self.ticks.next()
        return [side.zero(now) for page in run for side in (self.shared[page], self.private[page])]

    def _finish(self, run: range, changes: list[Change]) -> None:
        now = self.ticks.next()
        for change in changes:
            change.done(now)
        # A stream that is opened from now on must not bring them again.
        self._give_up(run)
        self.busy.difference_update(run)
        self._trace(f"done with {run.start}+{len(run)}")

    # The end

    def check_all(self) -> None:
        """The migration is over, and nothing happens any more: look at every page."""
        memory = self.guarded.read_all()
        for page in range(self.pages):
            self.check_page(page, memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])

    def check_page(self, page: int, content: bytes) -> None:
        now = self.ticks.next()
        self.shared[page].check(content, now, now, f"at the end: shared page {page}")
        if self.is_private[page]:
            if not self._attribute[page]:
                self._zero_unless_lost(page)
            self._access_private(page, None)


async def _of(future: Future[T]) -> Any:
    return await asyncio.wrap_future(future)
