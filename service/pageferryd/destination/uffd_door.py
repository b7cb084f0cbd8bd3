"""The userfaultfd door: the kernel tells of each touch of a page that is not there."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.linux.userfaultfd import Fault, Fork, Remap, Remove, Unmap

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.destination.address_map import AddressMap
    from pageferryd.linux.userfaultfd import Userfaultfd

_log = structlog.get_logger(__name__)

MAX_FORKS = 16
MAX_READS = 64
"""Reads in a row before others get their turn in the loop."""


class UffdDoor:
    """Reads one userfaultfd. The descriptor stays the installer's, which lets it go when every page is in."""

    name = "uffd"
    listens = False

    def __init__(self, uffd: Userfaultfd, addresses: AddressMap) -> None:
        self._uffd = uffd
        self._addresses = addresses
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Callable[[DoorEvents], None] = lambda _events: None
        self._failed: Callable[[Exception], None] = lambda _error: None
        # Never closed: what a child lacks of the memory would read as zeroes from then on.
        self._forks: list[int] = []

    def open(self, deliver: Callable[[DoorEvents], None], failed: Callable[[Exception], None]) -> None:
        """Begin to deliver."""
        self._deliver, self._failed = deliver, failed
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._uffd.fileno(), self._readable)

    def drain(self) -> None:
        """Deliver everything that is queued now."""
        if self._loop is not None:
            self._readable()

    def settled(self, first: int, pages: int, how: Settled) -> None:
        """Nothing: installing wakes who waits."""

    def close(self) -> None:
        """Stop delivering."""
        if self._loop is not None:
            self._loop.remove_reader(self._uffd.fileno())
            self._loop = None

    def _readable(self) -> None:
        loop = self._loop
        try:
            for _ in range(MAX_READS):
                if loop is None or not self._read_once(time.monotonic()):
                    return
        except FerryError as error:
            self.close()
            self._failed(error)

    def _read_once(self, seen: float) -> bool:
        """Read and deliver what one read gives; return whether there was anything."""
        events = self._uffd.read_events()
        if not events:
            return False
        faults: list[int] = []
        discards: list[tuple[int, int]] = []
        for event in events:
            if isinstance(event, Fault):
                page = self._addresses.page_at(event.address)
                if page is None:
                    raise FerryError(
                        Reason.USERFAULTFD_REFUSED,
                        f"the VMM's userfaultfd reports a fault at {event.address:#x}, outside the guest's memory",
                    )
                faults.append(page)
            elif isinstance(event, (Remove, Unmap)):
                discards.extend(self._addresses.runs(event.start, event.end))
            else:
                self._refuse(event)
        self._deliver(DoorEvents(discards, faults, seen))
        return True

    def _refuse(self, event: Remap | Fork) -> None:
        if isinstance(event, Fork):
            self._forks.append(event.fd)
            if len(self._forks) > MAX_FORKS:
                raise FerryError(Reason.USERFAULTFD_REFUSED, f"the VMM forked {len(self._forks)} times meanwhile")
            _log.error(
                "vmm_forked", remedy="do not fork a VMM while its guest's memory comes: the child waits for ever"
            )
            return
        if self._addresses.page_at(event.old) is None:
            return
        raise FerryError(
            Reason.USERFAULTFD_REFUSED,
            f"the VMM moved guest memory from {event.old:#x} to {event.new:#x} while its pages were coming",
        )
