"""What a userfaultfd tells: faults, and changes of the watched memory that the guest made itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason


class Fault(NamedTuple):
    """A thread waits for a page: the page's address (bytes), UFFD_PAGEFAULT_FLAG_* bits, and the thread's id.

    The address is exact to the byte where EXACT_ADDRESS was asked for; the thread 0 where THREAD_ID was not.
    """

    address: int
    flags: int
    thread: int

    @property
    def write(self) -> bool:
        """Whether it waits to write."""
        return bool(self.flags & abi.UFFD_PAGEFAULT_FLAG_WRITE)

    @property
    def minor(self) -> bool:
        """Whether the page is in the page cache already, and only not mapped."""
        return bool(self.flags & abi.UFFD_PAGEFAULT_FLAG_MINOR)

    @property
    def write_protect(self) -> bool:
        """Whether the page is present and write-protected."""
        return bool(self.flags & abi.UFFD_PAGEFAULT_FLAG_WP)


class Remove(NamedTuple):
    """The guest discarded the range (MADV_DONTNEED, MADV_REMOVE): it is zero from now on. Addresses in bytes."""

    start: int
    end: int


class Unmap(NamedTuple):
    """The range is mapped no longer. Addresses in bytes."""

    start: int
    end: int


class Remap(NamedTuple):
    """The range moved (mremap): old and new address and length, all in bytes."""

    old: int
    new: int
    length: int


class Fork(NamedTuple):
    """The guest forked; `fd` is a userfaultfd for the child's memory, which the receiver owns (or closes)."""

    fd: int


Event = Fault | Remove | Unmap | Remap | Fork


def _fork(fd: int) -> Fork:
    os.set_inheritable(fd, False)
    return Fork(fd)


_LOW_32_BITS = 0xFFFF_FFFF

_MAKERS: Mapping[int, Callable[[int, int, int], Event]] = {
    abi.UFFD_EVENT_PAGEFAULT: lambda flags, address, thread: Fault(address, flags, thread & _LOW_32_BITS),
    abi.UFFD_EVENT_REMOVE: lambda start, end, _: Remove(start, end),
    abi.UFFD_EVENT_UNMAP: lambda start, end, _: Unmap(start, end),
    abi.UFFD_EVENT_REMAP: Remap,
    abi.UFFD_EVENT_FORK: lambda fd, *_: _fork(fd & _LOW_32_BITS),
}


def parse_events(messages: bytes) -> list[Event]:
    """Return the events in what read(2) on a userfaultfd gave. FerryError where one is of a kind nobody asked for."""
    try:
        return [_MAKERS[kind](first, second, third) for kind, first, second, third in abi.MSG.iter_unpack(messages)]
    except KeyError as error:
        raise FerryError(
            Reason.USERFAULTFD_REFUSED, f"the kernel sent a userfaultfd event of unknown kind {error.args[0]:#x}"
        ) from None
