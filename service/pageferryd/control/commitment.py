"""The one step that cannot be taken back: the destination is told to run the guest, until it has answered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.handover import Told, Verdict, after_commit
from pageferryd.core.lifecycle import State

if TYPE_CHECKING:
    from pageferryd.config import Limits
    from pageferryd.control.peer import Destination
    from pageferryd.control.record import MigrationRecord

_log = structlog.get_logger(__name__)


class Commitment:
    """One migration's. `completed` is set when the destination has every page: that answers as well."""

    def __init__(self, record: MigrationRecord, limits: Limits, completed: asyncio.Event) -> None:
        self._record = record
        self._limits = limits
        self._completed = completed

    async def carry_out(self, destination: Destination, *, first: bool) -> None:
        """Return when the guest runs at the destination; raise FerryError only where it never did, and never will.

        `first`: no commit of this migration was sent before. Until there is an answer the guest is in doubt.
        """
        backoff = self._limits.reconnect_initial_seconds
        while not self._completed.is_set():
            try:
                await destination.commit()
                break
            except FerryError as error:
                verdict = after_commit(_told(error), first_in_this_life=first, arrived=self._completed.is_set())
                if verdict is Verdict.TAKE_BACK:
                    raise
                if verdict in (Verdict.GONE, Verdict.LOST):
                    # It was the destination's: what became of it there, the reports tell.
                    break
                first = False
                self._doubt(error)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._limits.reconnect_max_seconds)
        self._record.trouble(None)
        if self._record.state is State.IN_DOUBT:
            self._record.lifecycle.to(State.POSTCOPY)

    def _doubt(self, error: FerryError) -> None:
        record = self._record
        record.trouble(error)
        if record.state is not State.IN_DOUBT:
            record.lifecycle.to(State.IN_DOUBT)
        _log.warning("commit_unanswered", migration=record.migration_id, reason=error.reason, detail=error.message)


_TOLD = {Reason.NEVER_RAN: Told.NEVER_RAN, Reason.UNKNOWN_MIGRATION: Told.UNKNOWN, Reason.GIVEN_UP: Told.LOST}


def _told(error: FerryError) -> Told:
    return _TOLD.get(error.reason, Told.NO_ANSWER)
