"""How long the keeper waits before it starts a sidecar again that ended by itself."""

from __future__ import annotations

from typing import Final

STEADY_SECONDS: Final = 60.0


class Backoff:
    """Nothing at first, then `first` seconds, doubled each time, at most `most`. Reads no clock."""

    def __init__(self, first: float = 0.5, most: float = 10.0) -> None:
        self.most = most
        self._first = first
        self._failures = 0

    def after(self, lived: float) -> float:
        """Return how many seconds to wait after a sidecar that lived for `lived` seconds.

        One that lived for STEADY_SECONDS begins a new row.
        """
        if lived >= STEADY_SECONDS:
            self._failures = 0
        delay = min(self._first * 2 ** (self._failures - 1), self.most) if self._failures else 0.0
        # Bounded: 2 ** 64 times anything is beyond every `most`.
        self._failures = min(self._failures + 1, 64)
        return delay
