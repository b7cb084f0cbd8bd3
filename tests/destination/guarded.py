"""Guest memory of several regions under one userfaultfd, in the test's own process, touched by threads."""

from __future__ import annotations

import select
from concurrent.futures import Future, ThreadPoolExecutor

from pageferry.abi import userfaultfd as abi
from pageferry.vmm.memory import Backing, GuestMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.address_map import AddressMap
from pageferryd.linux.userfaultfd import Userfaultfd

DEADLINE = 10.0
HUGE = 2 << 20
EVENTS = abi.UFFD_FEATURE_EVENT_REMOVE | abi.UFFD_FEATURE_EVENT_UNMAP | abi.UFFD_FEATURE_EVENT_REMAP


def content(page: int) -> bytes:
    """What a page of the guest holds: no two alike, none zero."""
    return (page + 1).to_bytes(8, "little") * (PAGE_SIZE // 8)


def contents(first: int, pages: int) -> bytes:
    return b"".join(map(content, range(first, first + pages)))


class Guarded:
    """Regions of `sizes` granules each. Pages are numbered as in the layout, 4 KiB each whatever backs them."""

    def __init__(self, *sizes: int, backing: Backing = Backing.ANONYMOUS) -> None:
        granule = HUGE if backing is Backing.HUGETLBFS else PAGE_SIZE
        self.granule = granule // PAGE_SIZE
        self.memories = [GuestMemory(size * granule, backing) for size in sizes]
        self.uffd = Userfaultfd.open(EVENTS)
        for memory in self.memories:
            self.uffd.register(memory.address, memory.size)
        self.layout = Layout(
            [Region(number << 40, memory.size, granule) for number, memory in enumerate(self.memories)]
        )
        self.addresses = AddressMap(self.layout, [memory.address for memory in self.memories])
        self._threads = ThreadPoolExecutor(16)

    def reading(self, page: int, length: int = PAGE_SIZE) -> Future[bytes]:
        """Read the first bytes of a page in a thread, which waits where the page is missing."""
        memory, offset = self._at(page)
        return self._threads.submit(memory.read, offset, length)

    def writing(self, page: int, data: bytes) -> Future[None]:
        memory, offset = self._at(page)
        return self._threads.submit(memory.write, offset, data)

    def discarding(self, page: int, pages: int) -> Future[None]:
        """Give pages back in a thread, which waits until the event was read."""
        memory, offset = self._at(page)
        return self._threads.submit(memory.discard, offset, pages * PAGE_SIZE)

    def read(self, page: int, length: int = PAGE_SIZE) -> bytes:
        return self.reading(page, length).result(DEADLINE)

    def read_all(self) -> bytes:
        """Read every byte: only where nothing is missing."""
        return b"".join(self._threads.submit(one.read, 0, one.size).result(DEADLINE) for one in self.memories)

    def wait_queued(self) -> None:
        """Wait until the userfaultfd has something to tell."""
        poll = select.poll()
        poll.register(self.uffd.fileno(), select.POLLIN)
        assert poll.poll(DEADLINE * 1000), "the userfaultfd had nothing to tell"

    def close(self) -> None:
        # First the descriptor: it lets go of threads that still wait.
        self.uffd.close()
        self._threads.shutdown()
        for memory in self.memories:
            memory.close()

    def _at(self, page: int) -> tuple[GuestMemory, int]:
        piece = next(self.layout.pieces(page, 1))
        return self.memories[piece.region], piece.first * PAGE_SIZE
