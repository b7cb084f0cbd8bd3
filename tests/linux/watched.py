"""Memory under a userfaultfd in the test's own process, touched by threads."""

from __future__ import annotations

import ctypes
import select
from concurrent.futures import Future, ThreadPoolExecutor

from pageferry.abi import userfaultfd as abi
from pageferry.vmm.memory import Backing, GuestMemory
from pageferryd.linux.buffers import address_of
from pageferryd.linux.userfaultfd import Event, Outcome, Userfaultfd

PAGE = 4096
DEADLINE = 10.0
EVENTS = abi.UFFD_FEATURE_EVENT_REMOVE | abi.UFFD_FEATURE_EVENT_UNMAP | abi.UFFD_FEATURE_EVENT_REMAP

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.mremap.restype = ctypes.c_void_p


class Watched:
    """Guest memory, registered with a userfaultfd, and threads that may touch it."""

    def __init__(
        self, pages: int, backing: Backing = Backing.ANONYMOUS, features: int = 0, *, minor: bool = False
    ) -> None:
        self.page = 2 << 20 if backing is Backing.HUGETLBFS else PAGE
        self.memory = GuestMemory(pages * self.page, backing)
        self.uffd = Userfaultfd.open(features)
        self.operations = self.uffd.register(self.memory.address, self.memory.size, missing=not minor, minor=minor)
        self._threads = ThreadPoolExecutor(4)

    def at(self, page: int) -> int:
        return self.memory.address + page * self.page

    def reading(self, page: int, length: int = 16) -> Future[bytes]:
        """Read the first bytes of a page in a thread, which waits where the page is missing."""
        return self._threads.submit(self.memory.read, page * self.page, length)

    def writing(self, page: int, data: bytes) -> Future[None]:
        return self._threads.submit(self.memory.write, page * self.page, data)

    def doing(self, call: object, *arguments: object) -> Future[object]:
        assert callable(call)
        return self._threads.submit(call, *arguments)

    def copy(self, page: int, content: bytes, *, wake: bool = True) -> tuple[int, Outcome]:
        return self.uffd.copy(self.at(page), address_of(content), len(content), wake=wake)

    def zero(self, page: int, pages: int = 1) -> tuple[int, Outcome]:
        return self.uffd.zero(self.at(page), pages * self.page)

    def close(self) -> None:
        # First the descriptor: it lets go of threads that still wait.
        self.uffd.close()
        self._threads.shutdown()
        self.memory.close()


def wait_readable(uffd: Userfaultfd) -> None:
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    assert poll.poll(DEADLINE * 1000), "the userfaultfd had nothing to tell"


def wait_events(uffd: Userfaultfd) -> list[Event]:
    wait_readable(uffd)
    return uffd.read_events()


def page_of(text: bytes, size: int = PAGE) -> bytes:
    return (text * (size // len(text) + 1))[:size]
