"""What becomes of a guest at its destination whose missing pages cannot be had: its migration's policy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.config import Limits

MAX_LOSS_SECONDS = 31_536_000
"""The longest that a source may be gone, in seconds: a year."""


def check_policy(policy: migration_pb2.Policy) -> None:
    """Raise FerryError(INVALID_ARGUMENT) for a policy that cannot be."""
    if policy.on_loss not in migration_pb2.OnLoss.values():
        raise FerryError(Reason.INVALID_ARGUMENT, f"there is no on_loss {policy.on_loss}")
    if policy.loss_seconds > MAX_LOSS_SECONDS:
        raise FerryError(
            Reason.INVALID_ARGUMENT, f"loss_seconds is {policy.loss_seconds}; {MAX_LOSS_SECONDS} is the most"
        )


def kills(policy: migration_pb2.Policy, limits: Limits) -> bool:
    """Say whether a guest that cannot be made whole is killed; it waits otherwise."""
    if policy.on_loss == migration_pb2.ON_LOSS_UNSPECIFIED:
        return limits.on_loss == "kill"
    return policy.on_loss == migration_pb2.ON_LOSS_KILL


class LossWatch:
    """Calls `lost` once when a source has been gone for longer than the policy allows."""

    def __init__(self, policy: migration_pb2.Policy, limits: Limits, lost: Callable[[FerryError], None]) -> None:
        self._policy = policy
        self._limits = limits
        self._lost = lost
        self._timer: asyncio.TimerHandle | None = None
        self.expired = False
        """Whether the source has been gone for too long, and still is."""

    @property
    def _seconds(self) -> int:
        return self._policy.loss_seconds or self._limits.loss_seconds

    def gone(self) -> None:
        """The source is gone; said again, the time that it has is not begun anew."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def back(self) -> None:
        """The source is there again, or nobody needs it any more."""
        self.expired = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self.expired = True
        self._lost(FerryError(Reason.SOURCE_LOST, f"the source has been gone for {self._seconds} s"))
