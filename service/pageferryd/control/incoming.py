"""The destination's part of one migration: ready the VMM, load the state, run the guest, wait for its memory."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.control.approach import Approach
from pageferryd.control.figures import figures_of
from pageferryd.control.limits import pacing_options
from pageferryd.control.view import RateMeter, add_session, migration_of
from pageferryd.core.lifecycle import State
from pageferryd.linux.collapse import big_bytes, collapse

if TYPE_CHECKING:
    from pageferry.v1 import incoming_pb2, migration_pb2
    from pageferryd.config import Limits
    from pageferryd.control.arrival import Arrival
    from pageferryd.control.journal import Arriving
    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.core.figures import Figures

_log = structlog.get_logger(__name__)

_COLLAPSE_SECONDS = 2.0
"""How long the end of a migration waits for huge mappings; they go on being made after that."""


class Incoming:
    """One guest that comes to this host."""

    def __init__(self, record: MigrationRecord, guest: Guest, around: Surroundings) -> None:
        self.record = record
        self._guest = guest
        self._around = around
        self._loop = asyncio.get_running_loop()
        self._approach = Approach(guest, around, self._paused)
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self._no_commits: asyncio.Task[None] | None = None
        self._collapsing: asyncio.Task[None] | None = None
        self._committed = False
        self._running = False
        self._resumed_at = 0.0
        self._rate = RateMeter(time.monotonic)
        self._turn = asyncio.Lock()
        self._last: migration_pb2.Migration | None = None
        self.final_figures: Figures | None = None

    # The four steps of IncomingService

    async def prepare(self, request: incoming_pb2.PrepareRequest) -> None:
        """Ready the VMM and open the lanes; on failure nothing is left but the record of it."""
        async with self._turn:
            self.record.lifecycle.to(State.PREPARING)
            try:
                async with asyncio.timeout(self._limits.prepare_timeout):
                    await self._approach.ready(request, self._refuse_ended)
                    self._approach.note()
            except FerryError as error:
                await self._give_up(error)
                raise
            except TimeoutError as error:
                late = FerryError(Reason.HANDOFF_TIMEOUT, f"the VMM of {self._guest.guest_id} was not ready in time")
                await self._give_up(late)
                raise late from error
            except Exception as error:
                await self._give_up(FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}"))
                raise
            except asyncio.CancelledError:
                await self._give_up(FerryError(Reason.ABORTED_BY_SOURCE, "the source took its call back"))
                raise
            if self.record.state.final:
                await self._clean_up()
                self._refuse_ended()
            # The source may die before it commits: then the guest never ran here, and this end is given up.
            wait = self._limits.prepare_timeout + self._limits.handover_timeout
            self._deadline = self._loop.call_later(wait, self._no_commit)

    def _refuse_ended(self) -> None:
        if self.record.state.final:
            raise self.record.error or FerryError(Reason.ABORTED_BY_SOURCE, "the source gave up")

    async def hand_over(self, request: incoming_pb2.HandOverRequest) -> None:
        """Load the state of the guest, which stands still at the source: its memory is served from now on."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._limits.handover_timeout):
                    await self._load(request)
            except FerryError:
                # What ended it meanwhile says more than what that did to the load.
                self._refuse_ended()
                raise
            except TimeoutError as error:
                raise FerryError(
                    Reason.VMM_UNREACHABLE,
                    f"the VMM of {self._guest.guest_id} has not loaded its guest's state within "
                    f"{self._limits.handover_timeout:g} s",
                ) from error

    async def _load(self, request: incoming_pb2.HandOverRequest) -> None:
        self.record.lifecycle.require(State.PREPARING)
        await self._approach.ready_late(request.layout)
        self.record.lifecycle.to(State.HANDING_OVER)
        await self._approach.load(request.state, self._serve)
        self._approach.note()
        if self.record.state.final:
            # It was given up while the memory was on its way here.
            await self._clean_up()
            self._refuse_ended()

    def _serve(self, arrival: Arrival) -> None:
        arrival.session.open_doors()
        self._task = asyncio.create_task(self._run(arrival))

    async def commit(self) -> None:
        """Run the guest. It is this host's from the first line on, whatever happens to the rest."""
        record = self.record
        async with self._turn:
            if not self._committed:
                self._become_owner()
            # Where it failed since, it stays this host's: the report says so.
            if not self._running and not record.state.final:
                self._resumed_at = time.monotonic()
                await self._guest.driver.resume()
                self._running = True
                self._approach.arrived().session.start_push()
                record.changes.notify()

    def _become_owner(self) -> None:
        record = self.record
        if record.state.final:
            why = record.error.message if record.error is not None else "it was given up"
            raise FerryError(Reason.NEVER_RAN, f"migration {record.migration_id} ended before its commit: {why}")
        record.lifecycle.require(State.HANDING_OVER)
        self._around.journal.owns(record.migration_id)
        record.lifecycle.to(State.POSTCOPY)
        self._committed = True
        if self._deadline is not None:
            self._deadline.cancel()
        if record.error is not None:
            # The lanes were lost meanwhile.
            record.lifecycle.to(State.POSTCOPY_PAUSED)

    async def go_on(self, arriving: Arriving) -> None:
        """Fill on the memory of a guest that became this host's before an earlier sidecar of it ended.

        What cannot go on fails, and is noted still: the guest waits.
        """
        record = self.record
        for state in (State.PREPARING, State.HANDING_OVER, State.POSTCOPY):
            record.lifecycle.to(state)
        self._committed = True
        self._resumed_at = time.monotonic()
        async with self._turn:
            try:
                arrival = await self._approach.retake(arriving)
                self._serve(arrival)
                await self._guest.driver.resume()
                self._running = True
                arrival.session.start_push()
            except FerryError as error:
                _log.error("migration_not_resumed", migration=record.migration_id, detail=error.message)
                if self.arrival is not None:
                    await self._break_off(self.arrival, error)
                record.fail(error)
                if error.reason is Reason.VMM_GONE:
                    self._around.journal.ended(record.migration_id)

    async def abort(self, reason: str) -> None:
        """Give up, since the source does."""
        if self._committed:
            raise FerryError(
                Reason.ALREADY_COMMITTED, f"migration {self.record.migration_id}: the guest has run here already"
            )
        # Not in turn: a LoadState that hangs must not keep the source from taking its guest back.
        await self._give_up(FerryError(Reason.ABORTED_BY_SOURCE, reason or "the source gave no reason"))

    # What may happen later

    def reconnect(self) -> None:
        """Try lost lanes again now."""
        self.record.lifecycle.require(State.POSTCOPY_PAUSED)
        self._approach.arrived().session.reconnect_now()

    def limit(self, limits: migration_pb2.Limits) -> None:
        """Put new limits into force."""
        if self.record.state.final:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.record.migration_id} has ended")
        self.record.limits = limits
        self._approach.arrived().session.set_pacing(pacing_options(limits, self._limits))
        self.record.changes.notify()

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

    async def stop(self) -> None:
        """The sidecar ends: stop, with missing pages guarded for as long as the VMM keeps its userfaultfd."""
        # A guest that has not run here goes on at its source, and nobody may commit it any more.
        await self._give_up(FerryError(Reason.SHUTTING_DOWN, "the destination's sidecar is shutting down"))
        if self._deadline is not None:
            self._deadline.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.arrival is not None:
            await self.arrival.hold()

    async def _run(self, arrival: Arrival) -> None:
        """Fill the memory to the end; whatever goes wrong ends in a state of the record."""
        record = self.record
        try:
            await arrival.session.run()
            await self._finish(arrival)
        except FerryError as error:
            await self._break_off(arrival, error)
        except Exception as error:
            _log.exception("migration_broke", migration=record.migration_id)
            await self._break_off(arrival, FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}"))

    async def _finish(self, arrival: Arrival) -> None:
        """Every page is in, and the source knows."""
        record = self.record
        record.postcopy_seconds = time.monotonic() - self._resumed_at
        await arrival.let_go()
        self._around.journal.ended(record.migration_id)
        self._forget_arrival()
        self._guest.migration_id = None
        record.error = None
        try:
            await self._guest.driver.detach_pager()
        except FerryError as error:
            _log.warning("vmm_keeps_userfaultfd", migration=record.migration_id, detail=error.message)
        if self._around.settings.collapse_memory:
            self._collapsing = asyncio.create_task(self._collapse(arrival))
            await asyncio.wait([self._collapsing], timeout=_COLLAPSE_SECONDS)
        record.lifecycle.to(State.COMPLETED)
        _log.info("migration_completed", migration=record.migration_id, guest=record.guest_id)

    async def _collapse(self, arrival: Arrival) -> None:
        """Have small mappings put back together; the guest runs meanwhile, and need not wait for it to be complete."""
        await asyncio.to_thread(collapse, arrival.pid, arrival.spans)
        self.record.huge_bytes = await asyncio.to_thread(big_bytes, arrival.pid, arrival.spans)
        self.record.changes.notify()

    async def _break_off(self, arrival: Arrival, error: FerryError) -> None:
        """The memory cannot be completed: end it without ever showing the guest a page that is not its own."""
        if not self._committed:
            await self._give_up(error)
            return
        if error.reason is Reason.VMM_GONE:
            await arrival.abandon()
            self._around.journal.ended(self.record.migration_id)
            self._forget_arrival()
            await self._around.guests.forget(self._guest)
            self._let_guest_go()
        else:
            # The guest stays this migration's: its memory is not whole, and must not be read.
            await arrival.hold()
        self.record.fail(error)
        _log.error("migration_failed", migration=self.record.migration_id, reason=error.reason, detail=error.message)

    def _no_commit(self) -> None:
        error = FerryError(Reason.HANDOFF_TIMEOUT, "the source prepared a migration here and never committed it")
        self._no_commits = asyncio.create_task(self._give_up(error))

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
        if self._approach.touched:
            await self._kill()
        await self._approach.abandon()
        self._around.journal.ended(self.record.migration_id)
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
        record.trouble(error)
        if error is not None and record.state is State.POSTCOPY:
            record.lifecycle.to(State.POSTCOPY_PAUSED)
        elif error is None and record.state is State.POSTCOPY_PAUSED:
            record.lifecycle.to(State.POSTCOPY)

    @property
    def _limits(self) -> Limits:
        return self._around.settings.limits
