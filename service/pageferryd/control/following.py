"""Following a migration at the source: the destination's reports, mirrored in the record here."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.core.lifecycle import State

if TYPE_CHECKING:
    from pageferryd.config import Limits
    from pageferryd.control.peer import Destination
    from pageferryd.control.record import MigrationRecord

_MIRRORED = {
    migration_pb2.MIGRATION_STATE_POSTCOPY: State.POSTCOPY,
    migration_pb2.MIGRATION_STATE_POSTCOPY_PAUSED: State.POSTCOPY_PAUSED,
}


class Following:
    """The destination's view of one migration. `completed` is set when it has said that it has every page."""

    def __init__(self, record: MigrationRecord, completed: asyncio.Event, limits: Limits) -> None:
        self.report: migration_pb2.Migration | None = None
        """What the destination reported last."""
        self.failure: FerryError | None = None
        """What the migration failed with at the destination."""
        self._record = record
        self._completed = completed
        self._limits = limits

    async def follow(self, destination: Destination) -> None:
        """Mirror reports until the last, through any number of losses of the connection."""
        backoff = self._limits.reconnect_initial_seconds
        while True:
            try:
                async with aclosing(destination.reports()) as reports:
                    async for report in reports:
                        backoff = self._limits.reconnect_initial_seconds
                        if self._mirror(report):
                            return
                error = FerryError(Reason.DESTINATION_UNREACHABLE, "the destination stopped reporting")
            except FerryError as lost:
                if lost.reason is Reason.GIVEN_UP:
                    self.failure = lost
                    return
                error = lost
            self._mark_paused(error)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._limits.reconnect_max_seconds)

    def add_to(self, message: migration_pb2.Migration) -> None:
        """Add what the destination reported to a view of the migration."""
        report = self.report
        if report is None:
            return
        message.progress.CopyFrom(report.progress)
        message.memory_map.CopyFrom(report.memory_map)
        message.fault_latencies.extend(report.fault_latencies)
        if report.HasField("postcopy_duration"):
            message.postcopy_duration.CopyFrom(report.postcopy_duration)
        if not message.HasField("error") and report.HasField("error"):
            message.error.CopyFrom(report.error)

    def _mirror(self, report: migration_pb2.Migration) -> bool:
        """Take a report over; return whether it was the last."""
        record = self._record
        self.report = report
        if report.state == migration_pb2.MIGRATION_STATE_COMPLETED:
            record.changes.notify()
            return True
        if report.state == migration_pb2.MIGRATION_STATE_FAILED:
            self.failure = FerryError(_reason(report.error), f"at the destination: {report.error.message}")
            return True
        state = _MIRRORED.get(report.state)
        if state is not None:
            detail = report.error
            record.error = FerryError(_reason(detail), detail.message) if detail.reason else None
            if state is not record.state:
                record.lifecycle.to(state)
        record.changes.notify()
        return False

    def _mark_paused(self, error: FerryError) -> None:
        if not self._completed.is_set():
            self._record.trouble(error)
            if self._record.state is State.POSTCOPY:
                self._record.lifecycle.to(State.POSTCOPY_PAUSED)


def _reason(detail: migration_pb2.ErrorDetail) -> Reason:
    return Reason(detail.reason) if detail.reason in Reason.__members__ else Reason.INTERNAL
