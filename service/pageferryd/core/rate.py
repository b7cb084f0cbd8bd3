"""A rate limit: bytes are spent first, and whoever overspent waits until the debt is paid off."""

from __future__ import annotations


class RateLimit:
    """At most `bytes_per_second` on average; 0 is unlimited. Times are seconds of any one monotonic clock."""

    def __init__(self, bytes_per_second: int, now: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._budget = 0.0
        self._budget_at = now

    def is_over(self, now: float) -> bool:
        """Say whether nothing may be spent now."""
        rate = self.bytes_per_second
        if not rate:
            return False
        # At most a tenth of a second's worth is saved up.
        self._budget = min(self._budget + (now - self._budget_at) * rate, rate / 10)
        self._budget_at = now
        return self._budget < 0

    def open_at(self, now: float) -> float | None:
        """Return when something may be spent again, or None when that is now."""
        if not self.is_over(now):
            return None
        # A byte more than is owed: at the exact time rounding could leave a trace of debt, and no time to wait.
        return now + (1 - self._budget) / self.bytes_per_second

    def spend(self, size: int) -> None:
        """Take bytes off the budget; a negative size gives them back."""
        if self.bytes_per_second:
            self._budget -= size
