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

    def touched(self, page: int) -> int:
        """Take note of a fault; return how many pages behind it to fetch as well."""
        expected = self._stream_at(page)
        if expected is None:
            self._expect(page + 1, 0)
            return 0
        used = self._streams.pop(expected)
        self.counts.used += used
        window = min(max(2 * used, self._first_window), self._max_window)
        self._expect(page + 1 + window, window)
        return window

    def touched_early(self, page: int) -> None:
        """Take note of a fault on a page that is on its way as a neighbour of another."""
        self.counts.late += 1
        self.counts.used += 1

    def _stream_at(self, page: int) -> int | None:
        for expected in range(page, page - self._slack - 1, -1):
            if expected in self._streams:
                return expected
        return None

    def _expect(self, page: int, window: int) -> None:
        self._streams[page] = window
        if len(self._streams) > self._max_streams:
            self._streams.popitem(last=False)
