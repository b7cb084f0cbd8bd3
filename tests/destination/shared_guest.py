"""A guest whose memory is one file, with a userfault bitmap and perhaps a userfaultfd, in the test's own process.

With a userfaultfd its threads touch the memory through mappings that it watches. Without one they do what a vCPU does:
they look at the page's bit, and wait while it is set.
"""

from __future__ import annotations

import os
import select
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from enum import Enum

from guarded import DEADLINE, EVENTS, HUGE

from made_guest_memfd import guest_memfd
from pageferry.abi import userfaultfd as abi
from pageferry.vmm.bitmap import UserfaultBitmap as VmmBitmap
from pageferry.vmm.mapping import MappedMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.memfd_installer import MemfdInstaller
from pageferryd.destination.userfault_bitmap import UserfaultBitmap
from pageferryd.linux.memory_file import MemoryFile
from pageferryd.linux.userfaultfd import Userfaultfd

_FEATURES = EVENTS | abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MINOR_SHMEM
_HUGE_FEATURES = EVENTS | abi.UFFD_FEATURE_MISSING_HUGETLBFS | abi.UFFD_FEATURE_MINOR_HUGETLBFS
_MADV_REMOVE = 9


class Kind(Enum):
    MEMFD = "memfd"
    HUGE_MEMFD = "memfd of huge pages"
    GUEST_MEMFD = "guest_memfd"


class SharedGuest:
    """Regions of `sizes` granules each, all missing. Pages are numbered as in the layout, 4 KiB each."""

    def __init__(self, *sizes: int, kind: Kind = Kind.MEMFD, watched: bool = False) -> None:
        self._made = ExitStack()
        huge = kind is Kind.HUGE_MEMFD
        size = HUGE if huge else PAGE_SIZE
        # Behind the exit door alone, huge pages come in small pieces.
        self.granule = HUGE // PAGE_SIZE if huge and watched else 1
        total = sum(sizes) * size
        self.fd = self._make_file(kind, total)
        self.layout = Layout(
            [Region(number << 40, count * size, size if watched else PAGE_SIZE) for number, count in enumerate(sizes)]
        )
        # One mapping of all of the file a region, so that regions lie apart in memory.
        self.mappings = [MappedMemory(total, self.fd) for _ in sizes]
        self.addresses = AddressMap(
            self.layout,
            [
                mapping.address + start * PAGE_SIZE
                for mapping, start in zip(self.mappings, self.layout.starts, strict=True)
            ],
        )
        self.bits = VmmBitmap(self.layout.page_count)
        self.uffd: Userfaultfd | None = None
        if watched:
            self.uffd = Userfaultfd.open(_HUGE_FEATURES if huge else _FEATURES)
            for address, region in zip(self.addresses.addresses, self.layout.regions, strict=True):
                self.uffd.register(address, region.size, missing=True, minor=True)
        self.memory = MemoryFile(os.dup(self.fd), total)
        self.bitmap = UserfaultBitmap(os.dup(self.bits.memfd), self.layout.page_count)
        self.installer = MemfdInstaller(self.memory, self.bitmap, self.addresses, self.uffd)
        self.threads = ThreadPoolExecutor(16)
        self._ended = False

    def _make_file(self, kind: Kind, size: int) -> int:
        if kind is Kind.GUEST_MEMFD:
            return self._made.enter_context(guest_memfd(size))
        flags = os.MFD_HUGETLB | os.MFD_HUGE_2MB if kind is Kind.HUGE_MEMFD else 0
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | flags)
        self._made.callback(os.close, fd)
        os.ftruncate(fd, size)
        return fd

    def address_of(self, page: int) -> int:
        return self.addresses.address_of(page)

    def reading(self, page: int) -> Future[bytes]:
        """Read a page in a thread, which waits while it is missing."""
        return self.threads.submit(self._read if self.uffd is not None else self._read_as_vcpu, page)

    def _read(self, page: int) -> bytes:
        return self.mappings[self.layout.region_of(page)].read(page * PAGE_SIZE, PAGE_SIZE)

    def _read_as_vcpu(self, page: int) -> bytes:
        deadline = time.monotonic() + DEADLINE
        while self.bits.is_set(page):
            if self._ended or time.monotonic() > deadline:
                raise TimeoutError(f"the bit of page {page} is still set")
            time.sleep(0.001)
        return self._read(page)

    def writing(self, page: int, data: bytes) -> Future[None]:
        mapping = self.mappings[self.layout.region_of(page)]
        return self.threads.submit(mapping.write, page * PAGE_SIZE, data)

    def discarding(self, page: int) -> Future[None]:
        """Give a granule back in a thread, which waits for `drain` where a userfaultfd watches."""
        return self.threads.submit(self._discard, page)

    def _discard(self, page: int) -> None:
        if self.uffd is None:
            self.memory_of_the_vmm_punched(page)
            return
        mapping = self.mappings[self.layout.region_of(page)]
        assert mapping.advise(page * PAGE_SIZE, self.granule * PAGE_SIZE, _MADV_REMOVE) == 0

    def memory_of_the_vmm_punched(self, page: int) -> None:
        """Make a hole in the file without a word to anybody."""
        other = MemoryFile(os.dup(self.fd), self.layout.page_count * PAGE_SIZE)
        other.punch(page * PAGE_SIZE, self.granule * PAGE_SIZE)
        other.close()

    def wait_queued(self) -> None:
        """Wait until the userfaultfd has something to tell."""
        if self.uffd is not None:
            poll = select.poll()
            poll.register(self.uffd.fileno(), select.POLLIN)
            assert poll.poll(DEADLINE * 1000), "the userfaultfd had nothing to tell"

    def drain(self) -> None:
        if self.uffd is not None:
            self.uffd.read_events()

    def is_let_go(self) -> bool:
        held = [one._fd for one in (self.memory, self.bitmap)] + ([self.uffd.fileno()] if self.uffd else [])
        return all(fd < 0 for fd in held)

    def close(self) -> None:
        self._ended = True
        # First what watches: it lets go of threads that still wait.
        self.installer.abandon()
        self.threads.shutdown()
        for mapping in self.mappings:
            mapping.close()
        self.bits.close()
        self._made.close()
