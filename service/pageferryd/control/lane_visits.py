"""Who is connected to the lane server: whom to hang up on when there are too many.

Whoever can reach the port may connect, and say nothing. So those who have not proved yet what they want never keep
others out: when they are too many, the oldest of the host that has most of them goes. Who has proved it stays within
its migration, whose newest connections count: a destination that reconnects is not kept out by its own dead ones.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_UNPROVED: Final = 128
"""Most connections whose caller has not shown yet that it may have pages."""
MAX_OF_ONE: Final = 8
"""Most lanes of one migration, which needs two, and two more while it reconnects."""


class Visit:
    """One connection, from `host`."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.migration_id = ""
        """What it has proved to be for; empty before."""
        self.refused = False
        """Whether somebody was told why it is."""
        self.ends: Callable[[], object] = _nothing
        """Ends it, at whatever point it is."""


class Visits:
    """All connections, in the order in which they came."""

    def __init__(self) -> None:
        self._unproved: dict[Visit, None] = {}
        self._lanes: dict[str, dict[Visit, None]] = {}

    def __len__(self) -> int:
        return len(self._unproved) + sum(map(len, self._lanes.values()))

    def came(self, visit: Visit) -> Visit | None:
        """Add a connection; return one to hang up on where there are too many, which is forgotten here."""
        self._unproved[visit] = None
        if len(self._unproved) <= MAX_UNPROVED:
            return None
        crowd = Counter(one.host for one in self._unproved).most_common(1)[0][0]
        oldest = next(one for one in self._unproved if one.host == crowd)
        del self._unproved[oldest]
        return oldest

    def proved(self, visit: Visit, migration_id: str) -> Visit | None:
        """Note what a connection is for; return the oldest of that migration where it has too many, forgotten here."""
        self._unproved.pop(visit, None)
        visit.migration_id = migration_id
        lanes = self._lanes.setdefault(migration_id, {})
        lanes[visit] = None
        if len(lanes) <= MAX_OF_ONE:
            return None
        oldest = next(iter(lanes))
        del lanes[oldest]
        return oldest

    def went(self, visit: Visit) -> None:
        """Forget a connection. Twice does nothing."""
        self._unproved.pop(visit, None)
        lanes = self._lanes.get(visit.migration_id, {})
        lanes.pop(visit, None)
        if not lanes:
            self._lanes.pop(visit.migration_id, None)

    def all(self) -> list[Visit]:
        """Return every connection."""
        return [*self._unproved, *(visit for lanes in self._lanes.values() for visit in lanes)]


def _nothing() -> None:
    """End nothing yet."""
