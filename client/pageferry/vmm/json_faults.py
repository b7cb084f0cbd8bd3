"""Faults of many threads as JSON on the hand-off's connection (docs/handoff.md), without a thread of its own.

Of the threads that wait one reads, for all; once it has its own answer it leaves the reading to another. So a single
thread's fault is one send and one receive, with no other thread on its way.

Threads whose answers came together are woken one by one, each by the one before: woken at once, all but one would only
go to sleep again, for the GIL. What they ask for meanwhile is sent together once the last is awake. So faults that
came together stay together on all of their way, and the pager, too, wakes up once for all of them.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import logging
import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pageferry.vmm.fault_messages import Outcome, Resolution
from pageferry.vmm.regions import PAGE_SIZE
from pageferry.vmm.short_send import send_short

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from pageferry.vmm.handoff import HandoffRegion

_CHUNK: Final = 64 << 10
_MAX_REPLY: Final = 4 << 10
_MAX_TOKEN: Final = (1 << 32) - 1
_MAX_FLAGS: Final = (1 << 64) - 1
_MOST_TOGETHER: Final = 8
"""Faults that wait for each other before they are sent: the pager serves these while the next are gathered."""
_REQUEST: Final = b'{"vcpu":%d,"offset":%d,"flags":%d,"token":%d,"poison":true}'

_log = logging.getLogger(__name__)


class _Waiting:
    """A thread that waits until `over`, with a resolution or without; its turn comes then, or when it is to read."""

    __slots__ = ("address", "over", "resolution", "turn")

    def __init__(self, address: int) -> None:
        self.address = address
        self.over = False
        self.resolution: Resolution | None = None
        self.turn = threading.Lock()
        self.turn.acquire()


class JsonFaults:
    """Forwards faults of one page each on `connection`, a blocking socket that stays its owner's.

    `regions` are those that were handed over on it. All methods may be called from any thread.
    """

    def __init__(self, connection: socket.socket, regions: Sequence[HandoffRegion], most_in_flight: int) -> None:
        self._connection = connection
        self._regions = sorted((one.gpa_start, one.size, one.offset) for one in regions if one.gpa_start is not None)
        self._most_in_flight = most_in_flight
        self._decoder = json.JSONDecoder()
        self._text = ""
        # Wakes the thread that reads without a word from the pager. Closed by who is last to need it.
        self._nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        for fd in (connection.fileno(), self._nudge):
            self._poll.register(fd, select.POLLIN)
        # Guards all that follows.
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._token = 0
        self._reader: _Waiting | None = None
        # Whose turn it is, and who was called before them and has yet to call the next.
        self._turns: deque[_Waiting] = deque()
        self._called: _Waiting | None = None
        self._unsent: list[bytes] = []
        self._ended = False

    def resolve(self, vcpu: int, guest_address: int, flags: int = 0) -> Resolution | None:
        """Forward one shared page's fault and wait until it is resolved.

        None where it has to be asked for elsewhere: the address or the flags cannot be said here, too many wait, or
        the connection broke, or was closed.
        """
        address = guest_address - guest_address % PAGE_SIZE
        offset = self._offset_of(address)
        if offset is None or not 0 <= flags <= _MAX_FLAGS:
            return None
        mine = _Waiting(address)
        with self._lock:
            if self._ended or len(self._waiting) >= self._most_in_flight:
                return None
            self._token = token = self._token % _MAX_TOKEN + 1
            self._unsent.append(_REQUEST % (vcpu, offset, flags, token))
            self._waiting[token] = mine
            if self._reader is None:
                self._reader = mine
            together = self._called is not None and len(self._unsent) < _MOST_TOGETHER
            requests = b"" if together else self._take_unsent()
        try:
            self._send(requests)
            while not mine.over:
                if self._reader is mine:
                    self._read()
                else:
                    mine.turn.acquire()
                    self._call_next()
        except BaseException:
            # A signal's handler has raised: the others must not wait for this thread.
            self._give_up(token, mine)
            raise
        if self._reader is mine:
            self._leave_reading()
        return mine.resolution

    def deliver(self, delivery: Resolution) -> bool:
        """Give private pages, which came on another way, to a thread that waits for one of them; say if there was one.

        Others that wait for them are answered on the connection once the pages were imported.
        """
        addresses = delivery.bundle_addresses or (delivery.guest_address,)
        with self._lock:
            for token, waiting in self._waiting.items():
                if waiting.address in addresses:
                    del self._waiting[token]
                    self._release(waiting, delivery, nudge=True)
                    self._call_first()
                    return True
        return False

    def close(self) -> None:
        """Forward nothing any more: whoever waits gets None. The connection stays open."""
        self._end()

    def _offset_of(self, address: int) -> int | None:
        index = bisect.bisect_right(self._regions, address, key=_first_of) - 1
        if index < 0:
            return None
        first, size, offset = self._regions[index]
        return address - first + offset if address - first < size else None

    def _send(self, requests: bytes) -> None:
        if not requests:
            return
        try:
            # The kernel takes so few bytes whole or not at all, so what several threads send never mixes.
            send_short(self._connection, requests)
        except OSError as error:
            self._break(f"sending failed: {error}")
        except BaseException:
            # Others' requests may be among those that were not sent.
            self._break("a signal interrupted the sending")
            raise

    def _take_unsent(self) -> bytes:
        requests = b"".join(self._unsent)
        self._unsent.clear()
        return requests

    def _read(self) -> None:
        """Take what there is, as the one thread that reads."""
        try:
            for fd, _ in self._poll.poll():
                if fd == self._nudge:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                elif data := self._connection.recv(_CHUNK):
                    self._take(data)
                else:
                    self._break("the pager ended it")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            self._break(f"{type(error).__name__}: {error}")

    def _take(self, data: bytes) -> None:
        text, at = self._text + data.decode("ascii"), 0
        while at < len(text):
            if text[at] != "{":
                raise ValueError("what came is no JSON object")
            try:
                reply, at = self._decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                if len(text) - at > _MAX_REPLY:
                    raise
                # The rest of it has yet to come.
                break
            # Before anybody is taken out of those who wait: who is must be told something.
            token, outcome = reply["token"], _outcome_of(reply)
            with self._lock:
                waiting = self._waiting.pop(token, None)
                # Without one, it was given the page itself before.
                if waiting is not None:
                    self._release(waiting, Resolution(waiting.address, PAGE_SIZE, outcome))
        self._text = text[at:]
        with self._lock:
            self._call_first()

    def _leave_reading(self) -> None:
        """Have the youngest that waits read: it is likely to read for all others before its own answer comes."""
        with self._lock:
            heir = next(reversed(self._waiting.values()), None)
            self._reader = heir
            if heir is not None:
                self._turns.append(heir)
                self._call_first()
            elif self._ended:
                os.close(self._nudge)

    def _call_first(self) -> None:
        """Wake the first whose turn it is, with the lock held, unless one that was called will do so."""
        if self._turns and self._called is None:
            self._called = self._turns.popleft()
            self._called.turn.release()

    def _call_next(self) -> None:
        """Wake the next; the last one sends what all have asked for meanwhile."""
        with self._lock:
            self._called = None
            self._call_first()
            requests = b"" if self._called is not None else self._take_unsent()
        self._send(requests)

    def _give_up(self, token: int, mine: _Waiting) -> None:
        """Take a thread out that waits no longer."""
        with self._lock:
            self._waiting.pop(token, None)
            if mine in self._turns:
                self._turns.remove(mine)
            called = self._called is mine
        if called:
            self._call_next()
        if self._reader is mine:
            self._leave_reading()

    def _release(self, waiting: _Waiting, resolution: Resolution | None, *, nudge: bool = False) -> None:
        """End a thread's waiting, with the lock held; with `nudge` where it may be the one that reads meanwhile.

        Whoever does so calls the first afterwards.
        """
        waiting.resolution = resolution
        waiting.over = True
        if waiting is not self._reader:
            self._turns.append(waiting)
        elif nudge:
            os.eventfd_write(self._nudge, 1)

    def _break(self, why: str) -> None:
        if self._end():
            _log.warning("the hand-off's connection carries no faults any more (%s): the FaultService does", why)

    def _end(self) -> bool:
        """Let all that wait go; False where that was done before."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            for one in self._waiting.values():
                self._release(one, None, nudge=True)
            self._waiting.clear()
            self._unsent.clear()
            self._call_first()
            if self._reader is None:
                os.close(self._nudge)
        return True


def _first_of(region: tuple[int, int, int]) -> int:
    return region[0]


def _outcome_of(reply: dict[str, Any]) -> Outcome:
    if reply.get("poisoned"):
        return Outcome.POISONED
    return Outcome.ZERO if reply["zero"] else Outcome.INSTALLED
