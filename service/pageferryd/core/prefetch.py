"""Fault-around: which neighbours of a touched page to fetch with it.

A guest that walks memory shows it by faulting just behind the pages it was given last. The window of such a stream
doubles with each hit, as the kernel's readahead does (mm/readahead.c), and a guest that jumps about gets no window.
The fault behind a window is also the proof that the window was used: that is how its accuracy is known online.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class PrefetchCounts:
    """Pages fetched because a neighbour was touched; of those known to be wanted, and touched before they had come."""

    issued: int = 0
    used: int = 0
    late: int = 0


class FaultAround:
    """Streams of faults, the least recently hit forgotten first."""

    def __init__(self, first_window: int = 4, max_window: int = 64, streams: int = 32, slack: int = 3) -> None:
        self._first_window = first_window
        self._max_window = max_window
        self._max_streams = streams
        self._slack = slack
        self.counts = PrefetchCounts()
        # Keyed by the page that the stream is expected to touch next; the value is its last window.
        self._streams: OrderedDict[int, int] = OrderedDict()
        # By the same key: how many pages of that window were asked for and have not been counted as used.
        self._unproved: dict[int, int] = {}

    def touched(self, page: int, room: int) -> int:
        """Take note of a fault; return how many pages behind it, at most `room`, to fetch as well."""
        expected = self._stream_at(page)
        if expected is None:
            self._expect(page + 1, 0)
            return 0
        last = self._streams.pop(expected)
        self.counts.used += self._unproved.pop(expected, 0)
        window = min(max(2 * last, self._first_window), self._max_window, room)
        self._expect(page + 1 + window, window)
        return window

    def issued(self, stop: int, pages: int) -> None:
        """So many pages of the window that ends at page `stop` were asked for."""
        self.counts.issued += pages
        if stop in self._streams:
            self._unproved[stop] = self._unproved.get(stop, 0) + pages

    def touched_early(self, page: int) -> None:
        """Take note of a fault on a page that is on its way as a neighbour of another."""
        self.counts.late += 1
        for expected, unproved in self._unproved.items():
            if expected - self._streams[expected] <= page < expected:
                self.counts.used += 1
                self._unproved[expected] = unproved - 1
                if unproved == 1:
                    del self._unproved[expected]
                return

    def _stream_at(self, page: int) -> int | None:
        for expected in range(page, page - self._slack - 1, -1):
            if expected in self._streams:
                return expected
        return None

    def _expect(self, page: int, window: int) -> None:
        self._streams[page] = window
        if page in self._unproved:
            # What an older stream that met this one had left unproved stays so.
            del self._unproved[page]
        if len(self._streams) > self._max_streams:
            forgotten, _ = self._streams.popitem(last=False)
            self._unproved.pop(forgotten, None)
