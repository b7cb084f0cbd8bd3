"""The offload door: a VMM guards its memory itself, and asks its peer for each page on a connection.

The requests are PAGE_FAULT of Cloud Hypervisor's migration protocol. Beside what its guest touches the VMM asks for all
that is left, in order, when it is idle, and hangs up when it has everything. An answer says that the pages are in the
memory file; a page that the source could not read is answered with an error, and what its guest does then is the VMM's
affair: it never reads anything else in its place.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pageferry.abi import cloud_hypervisor as abi
from pageferry.abi.cloud_hypervisor import Command
from pageferry.errors import FerryError, Reason
from pageferryd.core.errors import PageRangeError
from pageferryd.core.page_set import PageSet
from pageferryd.destination.door import DoorEvents, Settled

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pageferryd.core.layout import Layout

MAX_WAITING = 64
"""Requests that are taken before the first is answered. Cloud Hypervisor sends one at a time."""
SLICE_PAGES = 512
"""A larger request is worked off in slices of so many pages."""
_FRAME = abi.REQUEST.size + abi.RANGE.size
_RETRY_SECONDS = 0.1
_HANG_UP_SECONDS = 1.0
"""How long a VMM that hangs up early may take to end: then it is gone, else it is in trouble."""


@dataclass(slots=True, eq=False)
class _Request:
    """Pages [first, stop) are waited for; those of them in `pages` are not settled, those from `next` on not asked."""

    first: int
    stop: int
    next: int
    pages: set[int]
    failed: bool = False

    @property
    def done(self) -> bool:
        return self.next == self.stop and not self.pages


class OffloadDoor:
    """Requests of one guest's VMM on `connection`, which stays the caller's.

    `make_present` makes zeroes of holes in the memory file before a page is answered for; it may raise FerryError.
    """

    name = "offload"
    listens = True

    def __init__(self, layout: Layout, connection: socket.socket, make_present: Callable[[int, int], None]) -> None:
        connection.setblocking(False)
        self._layout = layout
        self._connection = connection
        self._make_present = make_present
        self._deliver: Callable[[DoorEvents], None] | None = None
        self._tell_failure: Callable[[Exception], None] = lambda _error: None
        self._received = bytearray()
        self._to_send = bytearray()
        self._requests: deque[_Request] = deque()
        self._missing = PageSet(layout.page_count)
        self._missing.add(0, layout.page_count)
        self._timer: asyncio.TimerHandle | None = None
        self._working = False
        self._watching = False
        self._writing = False
        self._next_slices: asyncio.Handle | None = None
        self._slices_due = False
        self._hung_up = False
        self._over = asyncio.Event()
        self._failure: FerryError | None = None

    # As a door

    def open(self, deliver: Callable[[DoorEvents], None], failed: Callable[[Exception], None]) -> None:
        """Begin to deliver."""
        self._deliver, self._tell_failure = deliver, failed
        self._watch()

    def drain(self) -> None:
        """Read what has come, and deliver it."""
        self._work()

    def settled(self, first: int, pages: int, how: Settled) -> None:
        """Answer those requests all of whose pages are settled."""
        self._missing.remove(first, pages)
        if not self._requests or self._deliver is None:
            return
        stop = first + pages
        touched = False
        for request in self._requests:
            if request.pages and first < request.next and request.first < stop:
                settled = {page for page in request.pages if first <= page < stop}
                request.pages -= settled
                request.failed |= how is Settled.POISONED and bool(settled)
                touched |= bool(settled)
        if touched:
            self._work()

    def close(self) -> None:
        """Stop delivering; who waits is not answered."""
        if self._deliver is not None:
            self._deliver = None
            self._watching = self._writing = False
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            asyncio.get_running_loop().remove_writer(self._connection.fileno())
        if self._timer is not None:
            self._timer.cancel()

    async def finished(self) -> None:
        """Wait until the VMM has hung up: it needs no more answers. FerryError where the door cannot go on."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    # Requests

    def _work(self) -> None:
        """Answer, ask and read as far as that goes. Not within itself: pages may be settled while they are asked."""
        if self._working or self._deliver is None or self._hung_up:
            return
        self._working = True
        try:
            while self._step():
                pass
        except (FerryError, OSError) as error:
            self._fail(error)
        finally:
            self._working = False
        self._watch()

    def _watch(self) -> None:
        """Be woken by requests only while they are taken."""
        if self._deliver is None or self._hung_up or self._watching is not self._full:
            return
        self._watching = not self._full
        loop, number = asyncio.get_running_loop(), self._connection.fileno()
        if self._watching:
            loop.add_reader(number, self.drain)
        else:
            loop.remove_reader(number)

    def _step(self) -> bool:
        """Do one thing; return whether there may be another."""
        if self._deliver is None or self._hung_up:
            return False
        if self._requests and self._requests[0].done:
            if self._timer is None:
                self._answer(self._requests[0])
            return self._timer is None
        behind = [request for request in self._requests if not request.pages and not request.done]
        if behind and self._slices_due:
            self._slices_due = False
            for request in behind:
                self._ask(request)
            return True
        if behind and self._next_slices is None:
            # Other work of the loop goes first: pages that are there already are settled at once.
            self._next_slices = asyncio.get_running_loop().call_soon(self._ask_on)
        return self._take_one() or (not self._full and self._read())

    @property
    def _full(self) -> bool:
        """Whether no more requests are taken now: too many wait, or the VMM does not take its answers."""
        return len(self._requests) >= MAX_WAITING or bool(self._to_send)

    def _ask_on(self) -> None:
        self._next_slices, self._slices_due = None, True
        self._work()

    def _read(self) -> bool:
        """Read; return whether something has come."""
        try:
            received = self._connection.recv(MAX_WAITING * _FRAME)
        except BlockingIOError:
            return False
        except (ConnectionResetError, BrokenPipeError):
            received = b""
        if not received:
            self._end()
            return False
        self._received += received
        return True

    def _take_one(self) -> bool:
        """Take one request of what was read, and deliver its pages; return whether there was one."""
        if len(self._received) < abi.REQUEST.size or self._full:
            return False
        number, _, length = abi.REQUEST.unpack_from(self._received)
        if number != Command.PAGE_FAULT or length != abi.RANGE.size:
            raise FerryError(
                Reason.HANDOFF_MALFORMED, f"the VMM asks for command {number} of {length} bytes where it asks for pages"
            )
        if len(self._received) < _FRAME:
            return False
        address, size = abi.RANGE.unpack_from(self._received, abi.REQUEST.size)
        del self._received[:_FRAME]
        try:
            first, pages = self._layout.run_at(address, size)
        except PageRangeError as error:
            raise FerryError(Reason.PAGE_OUT_OF_RANGE, f"the VMM asks for pages that it has not: {error}") from error
        request = _Request(first, first + pages, first, set())
        self._requests.append(request)
        self._ask(request)
        return True

    def _ask(self, request: _Request) -> None:
        """Deliver the next slice of a request's pages."""
        first = request.next
        request.next = min(request.stop, first + SLICE_PAGES)
        request.pages.update(range(first, request.next))
        if self._deliver is not None:
            # Pages may be settled before this returns.
            self._deliver(DoorEvents((), range(first, request.next), time.monotonic()))

    # Answers

    def _answer(self, request: _Request) -> None:
        if not request.failed:
            try:
                self._make_present(request.first, request.stop - request.first)
            except FerryError as error:
                if error.reason is not Reason.NO_SPACE:
                    raise
                # The host may have memory later: the guest waits, and loses nothing.
                self._timer = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._again)
                return
        self._requests.popleft()
        self._to_send += abi.RESPONSE.pack(abi.STATUS_ERROR if request.failed else abi.STATUS_OK, 0)
        self._send()

    def _again(self) -> None:
        self._timer = None
        self._work()

    def _send(self) -> None:
        try:
            sent = self._connection.send(self._to_send)
        except BlockingIOError:
            sent = 0
        except (ConnectionResetError, BrokenPipeError):
            self._end()
            return
        del self._to_send[:sent]
        if bool(self._to_send) is not self._writing:
            self._writing = bool(self._to_send)
            loop, number = asyncio.get_running_loop(), self._connection.fileno()
            if self._writing:
                loop.add_writer(number, self._send)
            else:
                loop.remove_writer(number)
                self._work()

    # The end

    def _end(self) -> None:
        """The VMM has hung up."""
        if self._hung_up:
            return
        self._hung_up = True
        loop, number = asyncio.get_running_loop(), self._connection.fileno()
        loop.remove_reader(number)
        loop.remove_writer(number)
        self._requests.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._missing:
            self._timer = loop.call_later(_HANG_UP_SECONDS, self._too_early)
        else:
            self._over.set()

    def _too_early(self) -> None:
        if self._missing:
            self._fail(
                FerryError(Reason.VMM_FAILED, "the VMM hung up before all of its guest's memory was there; see its log")
            )
        else:
            self._over.set()

    def _fail(self, error: Exception) -> None:
        if self._failure is not None or self._deliver is None:
            return
        wrapped = (
            error if isinstance(error, FerryError) else FerryError(Reason.VMM_FAILED, f"the VMM's faults: {error}")
        )
        self._failure = wrapped
        tell = self._tell_failure
        self.close()
        self._over.set()
        tell(wrapped)
