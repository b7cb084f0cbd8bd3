"""The source's part of one migration: hand the guest over, then serve its memory until all of it has gone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.control.commitment import Commitment
from pageferryd.control.departure import Departure, PageAddresses
from pageferryd.control.departures_journal import Leaving, Step
from pageferryd.control.following import Following
from pageferryd.control.view import migration_of
from pageferryd.core.errors import CoreError
from pageferryd.core.lifecycle import State
from pageferryd.vmm.driver import Activity

if TYPE_CHECKING:
    from pageferry.v1 import migration_pb2
    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.control.turns import Turn
    from pageferryd.source.page_service import PageService
    from pageferryd.source.served import Served

_log = structlog.get_logger(__name__)

_LAST_REPORT_SECONDS = 5.0


class Outgoing:
    """One guest that leaves this host; with `left`, one that an earlier sidecar of this host was handing over."""

    def __init__(
        self,
        record: MigrationRecord,
        guest: Guest,
        around: Surroundings,
        pages: PageService,
        addresses: PageAddresses,
        left: tuple[Leaving, Step] | None = None,
    ) -> None:
        self.record = record
        self.guest = guest
        self._around = around
        self._pages = pages
        self._completed = asyncio.Event()
        self._departure = Departure(record, guest, around, pages, addresses, self._complete)
        self._following = Following(record, self._completed, around.settings.limits)
        self._left = left
        self.committed = False
        """Whether the guest may have run at the destination."""
        self._undoing = False
        self._turn: Turn | None = None
        self.begun = asyncio.Event()
        """Set once its memory is served, where it is to be served again."""
        self._task = asyncio.create_task(self._run())

    async def cancel(self) -> None:
        """Take the migration back, and wait until the guest runs here again. FerryError(ALREADY_COMMITTED)."""
        await self._begun()
        if self.committed or self.record.state.owned_by_destination:
            raise FerryError(
                Reason.ALREADY_COMMITTED,
                f"migration {self.record.migration_id}: the guest belongs to {self.record.destination_name} already",
            )
        await self._stop()

    async def reconnect(self) -> None:
        """Have the destination try its lanes again now."""
        self.record.lifecycle.require(State.POSTCOPY_PAUSED)
        await self._departure.peer().reconnect()

    async def limit(self, limits: migration_pb2.Limits) -> None:
        """Have the destination put limits into force."""
        if self.record.state.final:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.record.migration_id} has ended")
        if self.record.state is State.HANDING_OVER or self.record.state.owned_by_destination:
            await self._departure.peer().limit(limits)
        self.record.limits = limits
        self.record.changes.notify()

    @property
    def has_arrived(self) -> bool:
        """Whether the destination has said that it has every page."""
        return self._completed.is_set()

    @property
    def served(self) -> Served | None:
        """The guest's memory as it is served; None before there is any."""
        return self._departure.served

    def view(self) -> migration_pb2.Migration:
        """Return the migration as it stands here, with what the destination reported last."""
        message = migration_of(self.record)
        self._following.add_to(message)
        return message

    async def stop(self) -> None:
        """Stop: before the commit take the guest back, after it let go of everything but the guest."""
        await self._begun()
        await self._stop()

    async def run_here(self, error: FerryError) -> None:
        """An operator has decided that the guest runs here: nothing of it is served any more.

        FerryError(VMM_*) where it cannot be resumed; it can be asked for again.
        """
        await self._stop()
        self._pages.withdraw(self.record.migration_id)
        self._around.journal.departures.taken_back(self.record.migration_id)
        await self.guest.driver.resume()
        self.committed = False
        await self._decided(error)

    async def give_up(self, error: FerryError) -> None:
        """An operator has decided that the guest is never needed here again. FerryError(VMM_*) as in `run_here`."""
        await self._stop()
        await self.guest.driver.kill()
        self._pages.withdraw(self.record.migration_id)
        await self._around.guests.forget(self.guest)
        await self._decided(error)

    async def _decided(self, error: FerryError) -> None:
        await self._ended()
        self.guest.migration_id = None
        if self.record.state.final:
            self.record.trouble(error)
        else:
            self.record.fail(error)
        _log.warning("migration_resolved", migration=self.record.migration_id, detail=error.message)

    async def _ended(self) -> None:
        """Nothing of it need be known to a later sidecar."""
        self._around.journal.departures.ended(self.record.migration_id)
        await self._departure.drop_kept()

    async def _begun(self) -> None:
        # A task that is cancelled before its first step would undo nothing.
        await asyncio.sleep(0)

    async def _stop(self) -> None:
        # An undo that is under way must not be interrupted.
        if not self._undoing:
            self._task.cancel()
        await asyncio.wait([self._task])

    # From begin to end

    async def _run(self) -> None:
        record = self.record
        try:
            if self._left is None:
                await self._leave()
            else:
                await self._go_on(*self._left)
            await self._see_through()
        except asyncio.CancelledError:
            # By `stop` alone. Raised on, it would stay with the task, and keep the connections of its frames open.
            if not self.committed:
                await self._undo(FerryError(Reason.CANCELLED, "the migration was taken back"), State.CANCELLED)
        except (FerryError, CoreError) as error:
            await self._fail(error if isinstance(error, FerryError) else FerryError(Reason(error.reason), str(error)))
        except Exception as error:
            _log.exception("migration_broke", migration=record.migration_id)
            await self._fail(FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}"))
        finally:
            self.begun.set()
            if self._turn is not None:
                self._around.turns.give_back(self._turn)
            await self._departure.close()

    async def _leave(self) -> None:
        """Wait for a turn, and give the guest away."""
        await self._prepare()
        await self._departure.hand_over()
        self._departure.refuse_lost()
        self._around.journal.departures.given(self.record.migration_id)
        self.committed = True
        self.record.lifecycle.to(State.POSTCOPY)
        await self._commit(first=True)

    async def _prepare(self) -> None:
        turns = self._around.turns
        turn = self._turn = await turns.take(self.record)
        while True:
            try:
                await self._departure.prepare()
                turns.accepted(turn)
                return
            except FerryError as error:
                if error.reason is not Reason.TOO_MANY_MIGRATIONS:
                    raise
                self.record.trouble(error)
            await self._departure.start_over()
            await turns.again(turn)
            self.record.trouble(None)

    async def _go_on(self, leaving: Leaving, step: Step) -> None:
        """Find out where an earlier sidecar has left the guest."""
        record = self.record
        self._turn = self._around.turns.occupy(record)
        self._departure.take_up(leaving)
        record.lifecycle.to(State.PREPARING)
        record.lifecycle.to(State.HANDING_OVER)
        if step is Step.LEAVING:
            raise FerryError(Reason.INTERRUPTED, "this host's sidecar ended before the guest was given away")
        self.committed = True
        record.lifecycle.to(State.POSTCOPY)
        if step is Step.ARRIVED:
            self._completed.set()
            return
        self._departure.serve_again()
        self.begun.set()
        await self._commit(first=False)

    async def _commit(self, *, first: bool) -> None:
        """Have the destination run the guest. It is not run here from now on, unless that says it never did."""
        commitment = Commitment(self.record, self._around.settings.limits, self._completed)
        try:
            await commitment.carry_out(self._departure.peer(), first=first)
        except FerryError:
            self._around.journal.departures.taken_back(self.record.migration_id)
            self.committed = False
            raise
        if self._departure.paused_at is not None:
            self.record.downtime = time.monotonic() - self._departure.paused_at
        self.record.changes.notify()
        _log.info(
            "guest_handed_over",
            migration=self.record.migration_id,
            guest=self.record.guest_id,
            downtime=self.record.downtime,
        )

    def _complete(self) -> None:
        """The destination has every page; it is told so once that will not be forgotten."""
        self._around.journal.departures.arrived(self.record.migration_id)
        self._completed.set()

    async def _see_through(self) -> None:
        """Serve until the destination has said that it has everything; then end the VMM here."""
        following = asyncio.create_task(self._following.follow(self._departure.peer()))
        completed = asyncio.create_task(self._completed.wait())
        try:
            await asyncio.wait({following, completed}, return_when=asyncio.FIRST_COMPLETED)
            if not self._completed.is_set():
                following.result()
                raise self._following.failure or FerryError(
                    Reason.INTERNAL, "the destination ended without asking for the rest"
                )
            await self._end_vmm()
            await asyncio.wait({following}, timeout=_LAST_REPORT_SECONDS)
        finally:
            for task in (following, completed):
                task.cancel()
            await asyncio.gather(following, completed, return_exceptions=True)
        await self._around.guests.forget(self.guest)
        await self._ended()
        self.record.error = None
        self.record.lifecycle.to(State.COMPLETED)
        _log.info("migration_completed", migration=self.record.migration_id, guest=self.record.guest_id)

    async def _end_vmm(self) -> None:
        """End the VMM that the guest has left. Whether it goes or not, the guest is whole at the destination."""
        try:
            if self._left is not None:
                # This process has not spoken to it yet.
                await self.guest.driver.describe()
            await self.guest.driver.kill()
        except FerryError as error:
            _log.warning("vmm_not_killed", migration=self.record.migration_id, detail=error.message)
            if self._left is not None and error.reason is Reason.VMM_UNREACHABLE:
                await self._kill_vmm()

    async def _kill_vmm(self) -> None:
        """An earlier sidecar may have asked it to end, and it has not, and answers nobody any more."""
        try:
            await asyncio.to_thread(self._departure.kill_vmm)
        except FerryError as error:
            _log.warning("vmm_not_killed", migration=self.record.migration_id, detail=error.message)

    # When it goes wrong

    async def _fail(self, error: FerryError) -> None:
        if self.committed:
            # The guest may have run at the destination: it is not run here again, and its VMM stays as it is.
            self.record.fail(error)
            self.guest.migration_id = None
            if self._following.failure is not None and self._departure.vmm_ended:
                # Neither end has anything left of it that could be decided on.
                await self._ended()
            _log.error("migration_failed", migration=self.record.migration_id, detail=error.message)
        else:
            await self._undo(error, State.FAILED)

    async def _undo(self, error: FerryError, state: State) -> None:
        """The guest never ran at the destination: have that give up, and let the guest go on here."""
        record = self.record
        self._undoing = True
        _log.warning("migration_undone", migration=record.migration_id, reason=error.reason.value, detail=error.message)
        self._pages.withdraw(record.migration_id)
        resumed = True
        if self._departure.stopped:
            error, resumed = await self._take_back(error)
        destination = self._departure.destination
        if destination is not None:
            try:
                await destination.abort(error.message)
            except FerryError as refusal:
                _log.info("abort_unanswered", migration=record.migration_id, detail=refusal.message)
        if resumed:
            await self._ended()
        self.guest.migration_id = None
        if not record.state.final:
            record.trouble(error)
            record.lifecycle.to(state)

    async def _take_back(self, error: FerryError) -> tuple[FerryError, bool]:
        """Let the guest go on here; return what is to be told, and whether it goes on or has ended by itself."""
        driver = self.guest.driver
        try:
            # One that an earlier sidecar had stopped may have gone on by itself.
            if self._left is None or (await driver.describe()).activity is not Activity.RUNNING:
                await driver.resume()
        except FerryError as stuck:
            told = FerryError(error.reason, f"{error.message}; and the guest could not be resumed: {stuck.message}")
            return told, self._departure.vmm_ended
        return error, True
