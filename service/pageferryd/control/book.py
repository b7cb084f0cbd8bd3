"""The migrations that this sidecar knows: those under way, and the newest of those that ended."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control.figures import figures_of
from pageferryd.control.incoming import Incoming
from pageferryd.control.outgoing import Outgoing
from pageferryd.core.figures import Figures, Gauges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pageferryd.control.arrival import Arrival
    from pageferryd.core.refusals import Refusals

MAX_ENDED = 256

Mover = Incoming | Outgoing
"""One migration, at the end that is here."""

_ROLES = {migration_pb2.ROLE_SOURCE: "source", migration_pb2.ROLE_DESTINATION: "destination"}


class MigrationBook:
    """Migrations by id, oldest first. `evicted` is called with the id of each that is forgotten."""

    def __init__(self, max_active: int, evicted: Callable[[str], None], refusals: Refusals | None = None) -> None:
        self._max_active = max_active
        self._evicted = evicted
        self._refusals = refusals
        self._movers: OrderedDict[str, Mover] = OrderedDict()
        self._ended = Figures()
        self._counted: set[str] = set()

    def check_room(self) -> None:
        """Raise FerryError(TOO_MANY_MIGRATIONS) when as many are under way as may be."""
        active = sum(1 for _ in self.active())
        if active >= self._max_active:
            raise FerryError(
                Reason.TOO_MANY_MIGRATIONS, f"{active} migrations are under way, which is the limit: try again later"
            )

    def check_incoming_room(self, most: int) -> None:
        """Raise FerryError(TOO_MANY_MIGRATIONS) when as many guests come here as may; sources ask again."""
        coming = sum(1 for mover in self.active() if isinstance(mover, Incoming))
        if coming >= most:
            raise FerryError(Reason.TOO_MANY_MIGRATIONS, f"{coming} guests come here, which is the limit")

    def add(self, mover: Mover) -> None:
        """Keep a new migration; forget the oldest that ended where there are too many."""
        self._movers[mover.record.migration_id] = mover
        ended = [known for known in self._movers.values() if known.record.state.final]
        for one in ended:
            if not _is_live(one):
                self._count_ended(one)
        for old in ended[: max(len(ended) - MAX_ENDED, 0)]:
            self._count_ended(old)
            self._counted.discard(old.record.migration_id)
            del self._movers[old.record.migration_id]
            self._evicted(old.record.migration_id)

    def get(self, migration_id: str) -> Mover:
        """Return a migration, or raise FerryError(UNKNOWN_MIGRATION)."""
        mover = self._movers.get(migration_id)
        if mover is None:
            raise FerryError(Reason.UNKNOWN_MIGRATION, f"no migration {migration_id!r} is known here")
        return mover

    def knows(self, migration_id: str) -> bool:
        """Say whether there is such a migration."""
        return migration_id in self._movers

    def incoming(self, migration_id: str) -> Incoming:
        """Return a migration that comes to this host, or raise FerryError(UNKNOWN_MIGRATION)."""
        mover = self.get(migration_id)
        if not isinstance(mover, Incoming):
            raise FerryError(Reason.UNKNOWN_MIGRATION, f"migration {migration_id!r} does not come to this host")
        return mover

    def by_request(self, request_id: str) -> Outgoing | None:
        """Return the migration that a start with this request id began, or None."""
        for mover in self._movers.values():
            if isinstance(mover, Outgoing) and mover.record.request_id == request_id:
                return mover
        return None

    def newest_first(self) -> Iterator[Mover]:
        """Yield all migrations."""
        return reversed(self._movers.values())

    def active(self) -> Iterator[Mover]:
        """Yield those under way."""
        return (mover for mover in self._movers.values() if not mover.record.state.final)

    # What metrics show

    def figures(self) -> Figures:
        """Return what all migrations since the start have counted."""
        total = Figures()
        for mover in self._movers.values():
            if mover.record.state.final and not _is_live(mover):
                self._count_ended(mover)
            else:
                total.add(_figures(mover))
        total.add(self._ended)
        if self._refusals is not None:
            total.refusals.update(self._refusals.counts)
        return total

    def _count_ended(self, mover: Mover) -> None:
        """Add up once what will not change any more."""
        if mover.record.migration_id not in self._counted:
            self._counted.add(mover.record.migration_id)
            self._ended.add(_figures(mover))
            if isinstance(mover, Incoming):
                # Its latencies are most of what is left of it.
                mover.final_figures = None

    def gauges(self) -> Gauges:
        """Return how things stand."""
        gauges = Gauges()
        for mover in self._movers.values():
            gauges.migrations[_ROLES[mover.record.role], mover.record.state.name.lower()] += 1
            gauges.queued += mover.record.queue_position > 0
            if isinstance(mover, Incoming) and mover.arrival is not None:
                _add_arrival(gauges, mover.arrival)
        self._add_last(gauges)
        return gauges

    def _add_last(self, gauges: Gauges) -> None:
        ended = [mover for mover in self._movers.values() if mover.record.ended is not None]
        if not ended:
            return
        last = max(ended, key=lambda mover: mover.record.ended or 0.0)
        view = last.view()
        gauges.last_downtime_seconds = last.record.downtime
        if view.HasField("postcopy_duration"):
            gauges.last_postcopy_seconds = view.postcopy_duration.ToTimedelta().total_seconds()
        gauges.last_pages = view.progress.pages_present
        gauges.last_faults = view.progress.faults


def _is_live(mover: Mover) -> bool:
    return isinstance(mover, Incoming) and mover.arrival is not None


def _figures(mover: Mover) -> Figures:
    if isinstance(mover, Incoming):
        return figures_of(mover.arrival) if mover.arrival is not None else mover.final_figures or Figures()
    figures = Figures()
    if mover.served is not None:
        figures.served_pages.update(mover.served.pages)
        figures.served_bytes.update(mover.served.bytes)
    return figures


def _add_arrival(gauges: Gauges, arrival: Arrival) -> None:
    pager = arrival.session.pager
    gauges.faults_waiting += pager.faults_waiting
    gauges.push_window_bytes += pager.pacer.window
    gauges.push_under_way_bytes += pager.push_under_way
    gauges.demand_requests_under_way += pager.demand_under_way
    gauges.pages_missing += pager.map.missing
