"""How a migration ends at its destination: whole, given up before the guest ran, or with the guest lost here."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.control.approach import Approach
from pageferryd.control.collapsing import map_by_huge_pages
from pageferryd.control.figures import figures_of
from pageferryd.control.loss import LossWatch, kills
from pageferryd.control.view import RateMeter, add_session, migration_of
from pageferryd.core.lifecycle import State

if TYPE_CHECKING:
    from pageferry.v1 import migration_pb2
    from pageferryd.config import Limits
    from pageferryd.control.arrival import Arrival
    from pageferryd.control.arrivals_journal import ArrivalsJournal
    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.core.figures import Figures

_log = structlog.get_logger(__name__)

_COLLAPSE_SECONDS = 2.0
"""How long the end of a migration waits for huge mappings; they go on being made after that."""


class IncomingEnd:
    """What of one incoming migration does not depend on the steps that its source asks for."""

    def __init__(self, record: MigrationRecord, guest: Guest, around: Surroundings) -> None:
        self.record = record
        self._guest = guest
        self._around = around
        self._approach = Approach(guest, around, self._paused)
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self._collapsing: asyncio.Task[None] | None = None
        self._losing: asyncio.Task[None] | None = None
        self._loss = LossWatch(record.policy, around.settings.limits, self._source_lost)
        self._committed = False
        self._lost = False
        self._resumed_at = 0.0
        self._rate = RateMeter(time.monotonic)
        self._last: migration_pb2.Migration | None = None
        self.final_figures: Figures | None = None

    @property
    def guest(self) -> Guest:
        """The guest."""
        return self._guest

    @property
    def committed(self) -> bool:
        """Whether the guest is this host's."""
        return self._committed and not self._lost

    @property
    def source_address(self) -> str:
        """Where the source's sidecar is reached."""
        return self._approach.source_address

    def view(self) -> migration_pb2.Migration:
        """Return the migration as it stands."""
        message = migration_of(self.record)
        if self.arrival is not None:
            session = self.arrival.session
            add_session(message, session, self._rate.rate(session.pager.counts.push_bytes))
        elif self._last is not None:
            message.progress.MergeFrom(self._last.progress)
            message.memory_map.CopyFrom(self._last.memory_map)
            message.fault_latencies.extend(self._last.fault_latencies)
        return message

    @property
    def arrival(self) -> Arrival | None:
        """The guest's memory while it comes."""
        return self._approach.arrival

    async def _run(self, arrival: Arrival) -> None:
        """Fill the memory to the end; whatever goes wrong ends in a state of the record."""
        record = self.record
        try:
            await arrival.session.run()
            await self._finish(arrival)
        except FerryError as error:
            await self._break_off(error)
        except Exception as error:
            _log.exception("migration_broke", migration=record.migration_id)
            await self._break_off(FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}"))

    async def _finish(self, arrival: Arrival) -> None:
        """Every page is in, and the source knows."""
        record = self.record
        record.postcopy_seconds = time.monotonic() - self._resumed_at
        self._loss.back()
        await arrival.let_go()
        self._journal.completed(record.migration_id)
        await self._approach.drop_kept()
        self._forget_arrival()
        self._guest.migration_id = None
        record.error = None
        try:
            await self._guest.driver.detach_pager()
        except FerryError as error:
            _log.warning("vmm_keeps_userfaultfd", migration=record.migration_id, detail=error.message)
        if self._around.settings.collapse_memory:
            self._collapsing = asyncio.create_task(map_by_huge_pages(arrival, record))
            await asyncio.wait([self._collapsing], timeout=_COLLAPSE_SECONDS)
        record.lifecycle.to(State.COMPLETED)
        _log.info("migration_completed", migration=record.migration_id, guest=record.guest_id)

    async def _break_off(self, error: FerryError) -> None:
        """The memory cannot be completed: end it without ever showing the guest a page that is not its own."""
        if not self._committed:
            await self._give_up(error)
            return
        self._loss.back()
        if error.reason is Reason.VMM_GONE:
            await self._forget_lost()
        elif self.arrival is not None:
            # The guest stays this migration's: its memory is not whole, and must not be read.
            await self.arrival.hold()
        self.record.fail(error)
        _log.error("migration_failed", migration=self.record.migration_id, reason=error.reason, detail=error.message)
        if not self._lost and kills(self.record.policy, self._limits):
            await self._lose_as_policy_says(error)

    def _source_lost(self, error: FerryError) -> None:
        if kills(self.record.policy, self._limits):
            self._losing = asyncio.create_task(self._lose_as_policy_says(error))
        else:
            self.record.trouble(error)
            _log.warning("source_lost", migration=self.record.migration_id, detail=f"{error.message}: the guest waits")

    async def _lose_as_policy_says(self, error: FerryError) -> None:
        why = FerryError(error.reason, f"{error.message}; its policy is not to wait, and its VMM was killed")
        try:
            await self._lose(why)
        except FerryError as stuck:
            _log.error("vmm_not_killed", migration=self.record.migration_id, detail=stuck.message)
            self.record.fail(error)

    async def _lose(self, error: FerryError) -> None:
        """Kill the VMM of a guest that is this host's. FerryError(VMM_*) where it does not end: it waits on, then."""
        await self._guest.driver.kill()
        await self._stop_serving()
        await self._forget_lost()
        if self.record.state.final:
            self.record.trouble(error)
        else:
            self.record.fail(error)
        _log.error("guest_lost", migration=self.record.migration_id, guest=self.record.guest_id, detail=error.message)

    async def _stop_serving(self) -> None:
        serving, self._task = self._task, None
        if serving is not None and serving is not asyncio.current_task():
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def _forget_lost(self) -> None:
        """The VMM of a guest that was this host's has ended."""
        self._lost = True
        self._loss.back()
        if self.arrival is not None:
            await self.arrival.abandon()
        self._journal.lost(self.record.migration_id)
        self._forget_arrival()
        await self._around.guests.forget(self._guest)
        self._let_guest_go()

    async def _give_up(self, error: FerryError) -> None:
        """End it before the guest ran here. A VMM that handed its memory over can serve no other migration: kill it."""
        record = self.record
        if self._committed:
            return
        if not record.state.final:
            record.fail(error)
            _log.warning("migration_given_up", migration=record.migration_id, reason=error.reason, detail=error.message)
            if self._deadline is not None:
                self._deadline.cancel()
            serving = self._task if self._task is not asyncio.current_task() else None
            self._giving_up = asyncio.create_task(self._stop_and_clean_up(serving))
        if self._giving_up is not None:
            # Whoever asked may take the call back: what was begun is ended.
            await asyncio.shield(self._giving_up)

    async def _stop_and_clean_up(self, serving: asyncio.Task[None] | None) -> None:
        if serving is not None:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            # A task keeps how it was cancelled, and the connections of those frames with that.
            self._task = None
        await self._clean_up()

    async def _clean_up(self) -> None:
        # First: whatever becomes of this process, a source that asks later hears it.
        self._journal.never_ran(self.record.migration_id)
        if self._approach.touched:
            await self._kill()
        await self._approach.abandon()
        self._forget_arrival()
        self._let_guest_go()

    def _let_guest_go(self) -> None:
        if self._guest.migration_id == self.record.migration_id:
            self._guest.migration_id = None

    async def _kill(self) -> None:
        try:
            await self._guest.driver.kill()
        except FerryError as error:
            _log.warning("vmm_not_killed", migration=self.record.migration_id, detail=error.message)
        await self._around.guests.forget(self._guest)

    def _forget_arrival(self) -> None:
        """Keep the last figures, and let the bookkeeping of every page go."""
        self._last = self.view()
        if self.arrival is not None:
            self.final_figures = figures_of(self.arrival)
        self._approach.arrival = None

    def _paused(self, error: FerryError | None) -> None:
        record = self.record
        if error is None or not self._loss.expired:
            record.trouble(error)
        if error is None:
            self._loss.back()
        elif self._committed:
            self._loss.gone()
        if error is not None and record.state is State.POSTCOPY:
            record.lifecycle.to(State.POSTCOPY_PAUSED)
        elif error is None and record.state is State.POSTCOPY_PAUSED:
            record.lifecycle.to(State.POSTCOPY)

    @property
    def _limits(self) -> Limits:
        return self._around.settings.limits

    @property
    def _journal(self) -> ArrivalsJournal:
        return self._around.journal.arrivals
