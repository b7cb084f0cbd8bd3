"""Who was refused, where and why: counted without a bound on how often, told in the log within one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

API: Final = "api"
PEER: Final = "peer"
LANE: Final = "lane"
HANDOFF: Final = "handoff"
VMM: Final = "vmm"
PLACES: Final = (API, PEER, LANE, HANDOFF, VMM)
"""Where somebody can be refused: the migration service; the services for peers over gRPC; lanes over bare sockets; the
hand-off of a guest's memory; a VMM's other calls, and what it says of its memory."""

MAX_REMEMBERED: Final = 256
SECONDS_BETWEEN: Final = 60.0
_MAX_WHO: Final = 256


class Refusal(NamedTuple):
    """One refusal: its place, the name of its reason, who was refused, and what they were told."""

    where: str
    reason: str
    who: str
    detail: str


class Refusals:
    """Counts refusals. `tell` is given the first of a place, a reason and a caller, and then one a minute at most."""

    def __init__(self, clock: Callable[[], float], tell: Callable[[Refusal], None]) -> None:
        """`clock` returns seconds that only grow."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """Refusals by place and reason."""
        self._clock = clock
        self._tell = tell
        self._told_at: dict[tuple[str, str, str], float] = {}

    def note(self, where: str, reason: str, who: str, detail: str) -> None:
        """Count a refusal, and tell of it unless one like it was told of within the last minute."""
        self.counts[where, reason] += 1
        who = who[:_MAX_WHO]
        if self._is_due((where, reason, who)):
            self._tell(Refusal(where, reason, who, detail))

    def _is_due(self, key: tuple[str, str, str]) -> bool:
        now = self._clock()
        last = self._told_at.get(key)
        if last is not None and now - last < SECONDS_BETWEEN:
            return False
        self._told_at.pop(key, None)
        if len(self._told_at) >= MAX_REMEMBERED:
            del self._told_at[next(iter(self._told_at))]
        self._told_at[key] = now
        return True
