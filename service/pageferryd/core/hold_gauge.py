"""The hold gauge: whether it costs the host throughput that guests are held back for the sake of others."""

from __future__ import annotations

PERIOD = 0.02
"""Seconds over which throughput is measured."""
_TOO_LITTLE = 3
"""Holding is wasted where the host brings less than one in this many of what it can do."""
_REMEMBERED = 0.98
"""What remains, a period later, of the best throughput seen."""
_FIRST_FREE = 5
_FREE_EVERY = 25
"""Periods of holding until one without: only that shows what the host could do."""


class HoldGauge:
    """Throughput by periods. Times are seconds of the caller's clock, sizes bytes."""

    def __init__(self, now: float) -> None:
        self.free = False
        """Whether this is a period in which nobody is to be held back."""
        self._best = 0.0
        self._began = self._looked = now
        self._bytes = 0
        self._held_seconds = 0.0
        self._until_free = _FIRST_FREE

    def arrived(self, size: int) -> None:
        """Bytes of push came in, of any guest."""
        self._bytes += size

    @property
    def due(self) -> float:
        """When this period is over."""
        return self._began + PERIOD

    def look(self, now: float, *, held: bool) -> bool:
        """Say, at the end of a period, whether holding was wasted in it; `held`: somebody was since the last look."""
        if held:
            self._held_seconds += now - self._looked
        self._looked = now
        return now >= self.due and self._end_period(now)

    def _end_period(self, now: float) -> bool:
        seconds = now - self._began
        rate = self._bytes / seconds
        held = 2 * self._held_seconds > seconds
        wasted = held and _TOO_LITTLE * rate < self._best
        self._best = max(self._best * _REMEMBERED ** min(seconds / PERIOD, 1000), rate)
        self._until_free -= held
        self.free = self._until_free <= 0
        if self.free:
            self._until_free = _FREE_EVERY
        self._began, self._bytes, self._held_seconds = now, 0, 0.0
        return wasted
