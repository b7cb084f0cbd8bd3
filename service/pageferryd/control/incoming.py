"""The destination's part of one migration: ready the VMM, load the state, run the guest, wait for its memory."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.control.incoming_end import IncomingEnd
from pageferryd.control.limits import pacing_options
from pageferryd.core.lifecycle import State

if TYPE_CHECKING:
    from pageferry.v1 import incoming_pb2, migration_pb2
    from pageferryd.control.arrival import Arrival
    from pageferryd.control.arrivals_journal import Arriving
    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings

_log = structlog.get_logger(__name__)


class Incoming(IncomingEnd):
    """One guest that comes to this host."""

    def __init__(self, record: MigrationRecord, guest: Guest, around: Surroundings) -> None:
        super().__init__(record, guest, around)
        self._loop = asyncio.get_running_loop()
        self._no_commits: asyncio.Task[None] | None = None
        self._running = False
        self._turn = asyncio.Lock()

    # The four steps of IncomingService

    async def prepare(self, request: incoming_pb2.PrepareRequest) -> None:
        """Ready the VMM and open the lanes; on failure nothing is left but the record of it."""
        async with self._turn:
            self.record.lifecycle.to(State.PREPARING)
            try:
                async with asyncio.timeout(self._limits.prepare_timeout):
                    await self._approach.ready(request, self._refuse_ended)
                    await self._approach.note()
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
        await self._approach.note()
        if self.record.state.final:
            # It was given up while the memory was on its way here.
            await self._clean_up()
            self._refuse_ended()

    def _no_commit(self) -> None:
        error = FerryError(Reason.HANDOFF_TIMEOUT, "the source prepared a migration here and never committed it")
        self._no_commits = asyncio.create_task(self._give_up(error))

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
            raise never_ran(record.migration_id, record.error.message if record.error is not None else "")
        record.lifecycle.require(State.HANDING_OVER)
        self._journal.owns(record.migration_id)
        record.lifecycle.to(State.POSTCOPY)
        self._committed = True
        if self._deadline is not None:
            self._deadline.cancel()
        if record.error is not None:
            # The lanes were lost meanwhile.
            record.lifecycle.to(State.POSTCOPY_PAUSED)
            self._loss.gone()

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
                await self._break_off(error)

    async def give_up_owned(self, why: str) -> None:
        """End the guest here, as an operator has decided. FerryError(ILLEGAL_STATE) where there is nothing to decide.

        FerryError(VMM_*) where its VMM cannot be ended: nothing has changed then.
        """
        record = self.record
        stuck = record.state is State.POSTCOPY_PAUSED or (record.state is State.FAILED and not self._lost)
        if not self._committed or not stuck:
            raise FerryError(
                Reason.ILLEGAL_STATE,
                f"migration {record.migration_id} is {record.state.name} here: only a guest that waits for a source "
                "that is gone, or whose migration has failed, can be given up",
            )
        await self._lose(FerryError(Reason.GIVEN_UP, why))

    async def abort(self, reason: str) -> None:
        """Give up, since the source does."""
        if self._committed:
            raise FerryError(
                Reason.ALREADY_COMMITTED, f"migration {self.record.migration_id}: the guest has run here already"
            )
        # Not in turn: a LoadState that hangs must not keep the source from taking its guest back.
        await self._give_up(FerryError(Reason.ABORTED_BY_SOURCE, reason or "the source gave no reason"))
        # The source knows: it need not be remembered for it.
        self._journal.completed(self.record.migration_id)

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

    async def stop(self) -> None:
        """The sidecar ends: stop, with missing pages guarded for as long as the VMM keeps its userfaultfd."""
        self._loss.back()
        # A guest that has not run here goes on at its source, and nobody may commit it any more.
        await self._give_up(FerryError(Reason.SHUTTING_DOWN, "the destination's sidecar is shutting down"))
        if self._deadline is not None:
            self._deadline.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.arrival is not None:
            await self.arrival.hold()


def never_ran(migration_id: str, why: str) -> FerryError:
    """Return what a source is told that commits a guest which this host gave up before."""
    return FerryError(Reason.NEVER_RAN, f"migration {migration_id} ended before its commit: {why or 'it was given up'}")


def given_up(migration_id: str, why: str) -> FerryError:
    """Return what a source is told of a guest that was this host's and is lost here."""
    return FerryError(
        Reason.GIVEN_UP,
        f"migration {migration_id}: the guest was this host's, and was given up: {why or 'see its log'}",
    )
