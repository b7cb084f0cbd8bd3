"""Faults as JSON on the hand-off's socket, from many threads and without a thread of its own.

Of the threads that wait one reads, for all; once it has its own answer it leaves the reading to another. So a single
thread's fault is one send and one receive, with no other thread on its way.
"""

from __future__ import annotations

import json
import socket
import threading

from pageferry.errors import FerryError, Reason
from pageferry.vmm import Access

_CHUNK = 64 << 10


class _Waiting:
    def __init__(self) -> None:
        self.answered = False
        self.failed = False
        self.turn = threading.Lock()
        self.turn.acquire()


class JsonForwarder:
    """Forwards faults of a guest whose memory begins at guest address 0."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = json.JSONDecoder()
        self._text = ""
        # Guards all that follows.
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._token = 0
        self._somebody_reads = False
        self._ended = False

    def resolve(self, vcpu: int, guest_address: int, _size: int, _access: Access) -> None:
        """Forward one fault of one page and wait until it is resolved. FerryError(CANCELLED) after `close`."""
        mine = _Waiting()
        with self._lock:
            if self._ended:
                raise FerryError(Reason.CANCELLED, "the pager's socket was closed")
            self._token += 1
            token = self._token
            self._waiting[token] = mine
            reads, self._somebody_reads = not self._somebody_reads, True
        self._connection.sendall(b'{"vcpu":%d,"offset":%d,"flags":0,"token":%d}' % (vcpu, guest_address, token))
        while not mine.answered:
            if reads:
                self._read()
            else:
                mine.turn.acquire()
                reads = not mine.answered
        if reads:
            self._leave_reading()
        if mine.failed:
            raise FerryError(Reason.CANCELLED, "the pager's socket was closed")

    def close(self) -> None:
        """End the socket for both sides: whoever waits gets CANCELLED."""
        self._connection.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        data = self._connection.recv(_CHUNK)
        if not data:
            self._end()
            return
        text, at = self._text + data.decode("ascii"), 0
        with self._lock:
            while at < len(text):
                try:
                    reply, at = self._decoder.raw_decode(text, at)
                except json.JSONDecodeError:
                    break
                waiting = self._waiting.pop(reply["token"])
                waiting.answered = True
                waiting.turn.release()
        self._text = text[at:]

    def _leave_reading(self) -> None:
        with self._lock:
            self._somebody_reads = bool(self._waiting)
            for waiting in self._waiting.values():
                waiting.turn.release()
                return

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            for waiting in self._waiting.values():
                waiting.answered = waiting.failed = True
                waiting.turn.release()
            self._waiting.clear()
