"""Answers of both lanes, whatever carries them: what a request asks for, collected from a guest's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.checksums import checksums_of
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.runs import MAX_RUNS, Run, encode_parts

if TYPE_CHECKING:
    from pageferryd.core.errors import CoreError
    from pageferryd.core.requests import Request
    from pageferryd.source.served import Served

PUSH_MESSAGE_BYTES = 320 << 10
"""Most bytes of pages in one message of the push lane: what a fault's answer may have to wait behind."""
_FULL_RUNS = MAX_RUNS // 4

Parts = list[bytes | memoryview]


def fetch(served: Served, request: Request) -> Parts:
    """Return the whole answer of a demand request: a message, in parts. CoreError, FerryError."""
    runs: list[Run] = []
    data: Parts = []
    for first, pages in request.runs:
        _collect_whole(served, first, pages, runs, data)
    checksums = checksums_of(data) if served.checksums else b""
    served.count("demand", runs)
    return encode_parts(runs, data, checksums=checksums)


def _collect_whole(served: Served, first: int, pages: int, runs: list[Run], data: Parts) -> None:
    stop = first + pages
    while first < stop:
        collected = served.collect(first, stop - first, (stop - first) << 12)
        runs += collected.runs
        data += collected.data
        first = collected.next_page


class PushAnswer:
    """One push request on its way to be answered, in messages of bounded size, until its credit is spent."""

    def __init__(self, served: Served, request: Request) -> None:
        self._served = served
        self._credit = request.credit
        self._left = iter(request.runs)
        self._first, self._stop = 0, 0
        self._runs: list[Run] = []
        self._data: Parts = []
        self._checksums = b""
        self._size = 0
        self._spent = False
        self.ended = False
        """Whether the last message was given."""

    def next_part(self) -> Parts | None:
        """Collect some pages; return the message that these complete, in parts, if they do. CoreError, FerryError."""
        if self._first == self._stop:
            run = next(self._left, None)
            if run is None:
                self._spent = True
            else:
                self._first, self._stop = run[0], run[0] + run[1]
        if self._first < self._stop and not self._spent:
            self._collect()
        if self._spent:
            self.ended = True
            return self._take(last=True)
        if self._size >= PUSH_MESSAGE_BYTES or len(self._runs) > _FULL_RUNS:
            return self._take(last=False)
        return None

    def _collect(self) -> None:
        first = self._first
        credit = min(self._credit, PUSH_MESSAGE_BYTES - self._size)
        collected = self._served.collect(first, self._stop - first, credit)
        if self._served.checksums:
            # Now, since the pages wait here for others.
            self._checksums += checksums_of(collected.data)
        size = sum(map(len, collected.data))
        # Room for less than a page is no room, and a credit that pays for none is spent.
        self._spent = collected.next_page == first and self._credit < PAGE_SIZE
        self._size = self._size + size if collected.next_page > first else PUSH_MESSAGE_BYTES
        self._credit -= size
        self._runs += collected.runs
        self._data += collected.data
        self._first = collected.next_page

    def _take(self, *, last: bool) -> Parts:
        self._served.count("push", self._runs)
        message = encode_parts(self._runs, self._data, last=last, checksums=self._checksums)
        self._runs, self._data, self._checksums, self._size = [], [], b"", 0
        return message


def misbehaviour(error: CoreError) -> FerryError:
    """Return what the core refuses of a destination, as a reason to end its lane."""
    return FerryError(Reason(error.reason), f"the destination misbehaves: {error}")
