"""Pacing: how much the push lane may have under way.

Push yields to demand as far as demand suffers from it: a guest that touches memory at random waits about as long as the
push takes, and holding that back for each of its faults makes it wait longer. A fault slower than the objective halves
the push window. While faults are slow on average, each new one does so as well, and holds new requests back while it
waits, but never longer than `max_hold`, so that a guest that faults without a pause still gets its memory. The window
grows back while faults are quick, or there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.push_share import DEFAULT_WEIGHT
from pageferryd.core.rate import RateLimit

MIN_WINDOW = 64 << 10
GROWTH = 16 << 10
"""Most bytes that the window grows by with one message."""
FAULTS_COME_SECONDS = 10e-3
"""Since the last fault: a guest that has just touched a missing page is likely to touch the next soon."""
_REMEMBERED = 16
"""Faults over which latency is averaged, as a moving average does."""
_WORST = 4.0
"""Times the objective that one fault counts at most: a single one that waited for something else proves nothing."""


@dataclass(slots=True)
class PacingOptions:
    """Bounds of the pacer: bytes and seconds."""

    max_window: int = 1 << 20
    """Most bytes of push under way."""
    max_credit: int = 640 << 10
    """Most bytes of one push request, which is answered in two messages."""
    objective: float = 1e-3
    """Fault latency above which push gives way, in seconds."""
    max_hold: float = 1e-3
    """Longest time that waiting faults hold push back, in seconds."""
    bytes_per_second: int = 0
    """Most bytes a second; 0 is unlimited."""
    disabled: bool = False
    """No push at all."""
    weight: int = DEFAULT_WEIGHT
    """Share of what all guests of the host may push, against those of the others."""


class Pacer:
    """The push window, its growth, and the rate limit."""

    def __init__(self, options: PacingOptions, now: float) -> None:
        self.options = options
        self.window = options.max_window
        self.held_seconds = 0.0
        """How long push was held back for waiting faults or by the rate limit."""
        self._latency = 0.0
        self._held_since: float | None = None
        self._faulted_at = float("-inf")
        self._rate = RateLimit(options.bytes_per_second, now)

    def set_options(self, options: PacingOptions, now: float) -> None:
        """Put new bounds into force."""
        self.options = options
        self.window = max(self._least, min(self.window, options.max_window))
        self._rate = RateLimit(options.bytes_per_second, now)

    @property
    def _least(self) -> int:
        return min(MIN_WINDOW, self.options.max_window)

    def fault_raised(self, now: float) -> bool:
        """A fault begins to wait: where faults are slow, shrink, and hold new requests back from now on.

        Says whether push gives way.
        """
        if not self._slow:
            return False
        self._shrink()
        # Only the first of a burst starts the hold: later ones must not make it longer.
        if now - self._faulted_at > 2 * self.options.max_hold:
            self._faulted_at = now
        return True

    def fault_ended(self, latency: float) -> bool:
        """A fault was answered after `latency` seconds; say whether push gives way."""
        objective = self.options.objective
        self._latency += (min(latency, _WORST * objective) - self._latency) / _REMEMBERED
        if latency <= objective:
            return False
        self._shrink()
        return True

    @property
    def _slow(self) -> bool:
        return self._latency > self.options.objective

    def _shrink(self) -> None:
        self.window = max(self._least, self.window // 2)

    def arrived(self, size: int, waiting: int) -> None:
        """Bytes of push came in; grow unless somebody waits while faults are slow."""
        if not (waiting and self._slow):
            self.window = min(self.options.max_window, self.window + min(size // 4, GROWTH))

    def credit(self, under_way: int, waiting: int, now: float) -> int:
        """Return the bytes that the next push request may grant, or 0 to wait."""
        if self._is_held(waiting, now):
            if self._held_since is None:
                self._held_since = now
            return 0
        if self._held_since is not None:
            self.held_seconds += now - self._held_since
            self._held_since = None
        if self.options.disabled:
            return 0
        room = min(self.window - under_way, self.options.max_credit)
        if room >= MIN_WINDOW or (room >= PAGE_SIZE and not under_way):
            return room - room % PAGE_SIZE
        return 0

    def granted(self, size: int) -> None:
        """A push request granted bytes: they count against the rate."""
        self._rate.spend(size)

    def unspent(self, size: int) -> None:
        """A push request was answered with fewer bytes than granted: the rest counts no more."""
        self._rate.spend(-size)

    @property
    def gives_none(self) -> bool:
        """Whether the last call of `credit` gave nothing for another reason than what is under way."""
        return self.options.disabled or self._held_since is not None

    def _is_held(self, waiting: int, now: float) -> bool:
        if self.options.disabled:
            return False
        if waiting and now < self._faulted_at + self.options.max_hold:
            return True
        return self._rate.is_over(now)

    def wake_at(self, waiting: int, now: float) -> float | None:
        """Return when a held push may go on, or None when time alone changes nothing."""
        if self.options.disabled:
            return None
        times = []
        if waiting and now < self._faulted_at + self.options.max_hold:
            times.append(self._faulted_at + self.options.max_hold)
        open_at = self._rate.open_at(now)
        if open_at is not None:
            times.append(open_at)
        return max(times) if times else None
