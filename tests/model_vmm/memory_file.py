"""The model without a userfaultfd: a memory file, and a bitmap that is looked at before an access, as KVM does."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from pageferry.v1 import fault_pb2
from pageferry.vmm.bitmap import UserfaultBitmap as VmmBitmap
from pageferry.vmm.memory import Backing, GuestMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.page_set import PageSet
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.door import FaultDoor
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.installer import Installer
from pageferryd.destination.memfd_installer import MemfdInstaller
from pageferryd.destination.userfault_bitmap import UserfaultBitmap
from pageferryd.linux.memory_file import MemoryFile

from .oracle import Violation
from .vmm import ModelVmm
from .world import World

_RESOLVED = (fault_pb2.OUTCOME_INSTALLED, fault_pb2.OUTCOME_ZERO, fault_pb2.OUTCOME_SPURIOUS)
_TORN_OUT = b"no data!" * (PAGE_SIZE // 8)
"""What a page that cannot be read at the source holds, as far as the oracle knows."""


class FileMemory:
    """Regions that lie one behind the other in a memfd, and the bitmap of their pages."""

    def __init__(self, sizes: list[int]) -> None:
        self.layout = Layout([Region(number << 40, size * PAGE_SIZE) for number, size in enumerate(sizes)])
        self._memory = GuestMemory(self.layout.page_count * PAGE_SIZE, Backing.SHMEM)
        self.bitmap = VmmBitmap(self.layout.page_count)

    def installer(self) -> MemfdInstaller:
        memory = MemoryFile(os.dup(self._memory.memfd), self._memory.size)
        bitmap = UserfaultBitmap(os.dup(self.bitmap.memfd), self.layout.page_count)
        starts = [self._memory.address + start * PAGE_SIZE for start in self.layout.starts]
        return MemfdInstaller(memory, bitmap, AddressMap(self.layout, starts))

    def reading(self, page: int) -> Future[bytes]:
        return _done(self._memory.read(page * PAGE_SIZE, PAGE_SIZE))

    def writing(self, page: int, data: bytes) -> Future[None]:
        return _done(self._memory.write(page * PAGE_SIZE, data))

    def discarding(self, page: int, pages: int) -> Future[None]:
        return _done(self._memory.discard(page * PAGE_SIZE, pages * PAGE_SIZE))

    def read_all(self) -> bytes:
        return self._memory.read(0, self._memory.size)

    def let_go(self) -> None:
        """Nobody waits in the kernel."""

    def close(self) -> None:
        self.bitmap.close()
        self._memory.close()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class FileVmm(ModelVmm):
    """Looks at a page's bit before each access; a page that is private is imported to a place of its own."""

    def poison(self, pages: set[int], found: PageSet) -> None:
        """Take note of what cannot be read at the source, and where the pager keeps what it has found of it."""
        self._poisoned = pages
        self._found = found

    async def access(self, page: int, word: bytes | None) -> None:
        while self.guarded.bitmap.is_set(page):
            if not await self._userfault(page):
                return
        if page in self._poisoned and page not in self.given_up and page not in self.busy:
            raise Violation(f"the bit of page {page} is clear, and the page was never read")
        await super().access(page, word)

    async def _userfault(self, page: int) -> bool:
        """The exit of a set bit; return whether the access may be tried again."""
        was_poisoned = page in self._poisoned and page not in self.given_up
        response = await self.client.fault(page, 1, private=self.is_private[page])
        if response is None and not self.released:
            await asyncio.sleep(0)
            return True
        if response is None:
            if page not in self._found and self.guarded.bitmap.is_set(page):
                raise Violation(f"the migration has ended, and the bit of page {page} is set")
            return page not in self._found
        self._trace(f"bit of {page} is set: {fault_pb2.Outcome.Name(response.outcome)}")
        if response.outcome == fault_pb2.OUTCOME_POISONED:
            if not was_poisoned and page not in self.busy:
                raise Violation(f"page {page} was answered as poisoned")
            return False
        if response.outcome in _RESOLVED and self.guarded.bitmap.is_set(page):
            raise Violation(f"page {page} was resolved ({response.outcome}), and its bit is set")
        if response.outcome == fault_pb2.OUTCOME_ZERO and self._may_be_made_zero(page):
            self.make_private_zero(page)
        return True

    def _may_be_made_zero(self, page: int) -> bool:
        return self.is_private[page] and not self._attribute[page] and page not in self.busy

    async def discard(self, first: int, pages: int) -> None:
        """The balloon: without a userfaultfd the pager has to be told."""
        if len({self.is_private[page] for page in range(first, first + pages)}) > 1:
            pages = 1
        await super().discard(first, pages)

    async def tell_of_discard(self, first: int, pages: int) -> None:
        if not self.client.over:
            await self.client.convert(first, pages, private=self.is_private[first])

    def check_page(self, page: int, content: bytes) -> None:
        if page in self._poisoned and page not in self.given_up:
            if not self.guarded.bitmap.is_set(page):
                raise Violation(f"at the end the bit of poisoned page {page} is clear")
            return
        # What is given away when the migration is over is no business of the pager.
        if self.guarded.bitmap.is_set(page) and page not in self._found:
            raise Violation(f"at the end the bit of page {page} is set")
        super().check_page(page, content)


class FileWorld(World):
    """The same guest, with its memory in a file and one door."""

    kind_of_vmm = FileVmm

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.vmm.poison(self.poisoned, self.session.pager.map.poisoned)
        self.source.tear_out(self.poisoned)

    @cached_property
    def poisoned(self) -> set[int]:
        """Pages that cannot be read at the source."""
        share = self.rng.choice([0.0, 0.0, 0.1])
        # A hole is zero without being read.
        pages = set(range(self.guarded.layout.page_count)) - self.zeroes
        return {page for page in pages if self.rng.random() < share}

    def content(self, page: int) -> bytes:
        return _TORN_OUT if page in self.poisoned else super().content(page)

    def make_memory(self, sizes: list[int]) -> Any:
        return FileMemory(sizes)

    def make_installer(self) -> Installer:
        return self.guarded.installer()

    def make_doors(self, door: ExitDoor) -> list[FaultDoor]:
        return [door]

    async def _device(self) -> None:
        """No device: nothing guards what it would touch."""
