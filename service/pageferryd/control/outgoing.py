"""The source's part of one migration: hand the guest over, then serve its memory until all of it has gone."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, migration_pb2
from pageferryd.control.exporting import exporter
from pageferryd.control.fitting import refuse_immovable
from pageferryd.control.following import Following
from pageferryd.control.peer import PROTOCOL_VERSION, Destination
from pageferryd.control.view import migration_of
from pageferryd.core.errors import CoreError
from pageferryd.core.lifecycle import State
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import layout_to_proto
from pageferryd.source.served import TOKEN_BYTES, Served

if TYPE_CHECKING:
    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.source.page_service import PageService
    from pageferryd.vmm.driver import Description, Memory

_log = structlog.get_logger(__name__)

_LAST_REPORT_SECONDS = 5.0


class PageAddresses(NamedTuple):
    """Where destinations reach this host's page service, and its lanes over sockets (empty where there are none)."""

    grpc: str
    lanes: str = ""


class Outgoing:
    """One guest that leaves this host."""

    def __init__(
        self, record: MigrationRecord, guest: Guest, around: Surroundings, pages: PageService, addresses: PageAddresses
    ) -> None:
        self.record = record
        self._guest = guest
        self._around = around
        self._pages = pages
        self._addresses = addresses
        self._destination: Destination | None = None
        self._announced = record.limits
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._completed = asyncio.Event()
        self._following = Following(record, self._completed, around.settings.limits)
        self._paused_at: float | None = None
        self._committed = False
        self._undoing = False
        self.served: Served | None = None
        self._task = asyncio.create_task(self._run())

    async def cancel(self) -> None:
        """Take the migration back, and wait until the guest runs here again. FerryError(ALREADY_COMMITTED)."""
        await self._begun()
        if self._committed or self.record.state.owned_by_destination:
            raise FerryError(
                Reason.ALREADY_COMMITTED,
                f"migration {self.record.migration_id}: the guest belongs to {self.record.destination_name} already",
            )
        await self._stop()

    async def reconnect(self) -> None:
        """Have the destination try its lanes again now."""
        self.record.lifecycle.require(State.POSTCOPY_PAUSED)
        await self._peer().reconnect()

    async def limit(self, limits: migration_pb2.Limits) -> None:
        """Have the destination put limits into force."""
        if self.record.state.final:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.record.migration_id} has ended")
        if self.record.state is State.HANDING_OVER or self.record.state.owned_by_destination:
            await self._peer().limit(limits)
        self.record.limits = limits
        self.record.changes.notify()

    def view(self) -> migration_pb2.Migration:
        """Return the migration as it stands here, with what the destination reported last."""
        message = migration_of(self.record)
        self._following.add_to(message)
        return message

    async def stop(self) -> None:
        """Stop: before the commit take the guest back, after it let go of everything but the guest."""
        await self._begun()
        await self._stop()

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
            await self._prepare()
            await self._hand_over()
            await self._commit()
            await self._see_through()
        except asyncio.CancelledError:
            # By `stop` alone. Raised on, it would stay with the task, and keep the connections of its frames open.
            if not self._committed:
                await self._undo(FerryError(Reason.CANCELLED, "the migration was taken back"), State.CANCELLED)
        except (FerryError, CoreError) as error:
            await self._fail(error if isinstance(error, FerryError) else FerryError(Reason(error.reason), str(error)))
        except Exception as error:
            _log.exception("migration_broke", migration=record.migration_id)
            await self._fail(FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}"))
        finally:
            await self._let_go()

    async def _prepare(self) -> None:
        """Ready both ends; the guest runs on."""
        record, guest = self.record, self._guest
        record.lifecycle.to(State.PREPARING)
        description = await guest.driver.describe()
        refuse_immovable(guest, description)
        self._destination = Destination(
            record.destination_address, record.destination_name, self._around.tls, record.migration_id
        )
        answer = await self._destination.probe(guest.guest_id)
        if not record.destination_name:
            record.destination_name = answer.host
        if description.memory is not None:
            self._offer(description.memory)
        await self._have_prepared(description)
        while self._announced is not record.limits:
            # They were changed meanwhile.
            self._announced = record.limits
            await self._peer().limit(record.limits)
        await guest.driver.ready_to_pause()

    def _offer(self, memory: Memory) -> Served:
        """Offer the memory to the destination; it is not read yet."""
        record, layout = self.record, memory.layout
        source = SourceMemory.open(layout, memory.locations, memory.holder)
        self.served = Served(
            record.migration_id, self._token, record.destination_name, source, layout, self._completed.set
        )
        self._pages.offer(self.served)
        return self.served

    async def _have_prepared(self, description: Description) -> None:
        """Have the destination's VMM readied."""
        record, memory = self.record, description.memory
        self._announced = record.limits
        request = incoming_pb2.PrepareRequest(
            migration_id=record.migration_id,
            guest_id=record.guest_id,
            protocol_version=PROTOCOL_VERSION,
            layout=layout_to_proto(memory.layout) if memory is not None else None,
            page_address=self._addresses.grpc,
            lane_address=self._addresses.lanes,
            source_name=record.source_name,
            token=self._token,
            limits=record.limits,
            driver=self._guest.driver_name,
            machine=description.machine,
        )
        await self._peer().prepare(request, self._around.settings.limits.prepare_timeout + 5.0)

    async def _hand_over(self) -> None:
        """Stop the guest, and send what it is beside its memory."""
        driver = self._guest.driver
        self.record.lifecycle.to(State.HANDING_OVER)
        self._paused_at = time.monotonic()
        await driver.pause()
        saved, private = await asyncio.gather(driver.save_state(), driver.private_pages())
        served, told_now = self.served, None
        if saved.memory is not None:
            served, told_now = self._offer(saved.memory), layout_to_proto(saved.memory.layout)
        if served is None:
            raise FerryError(Reason.VMM_FAILED, f"the VMM of guest {self._guest.guest_id} did not tell its memory")
        layout = served.layout
        runs = [layout.run_at(address, size) for address, size in private.ranges]
        served.open(runs, exporter(driver, layout) if private.opaque else None)
        await self._peer().hand_over(saved.state, told_now, self._around.settings.limits.handover_timeout + 2.0)

    async def _commit(self) -> None:
        """Give the guest away. It never runs here from now on, unless the destination says it never did there."""
        record = self.record
        self._committed = True
        record.lifecycle.to(State.POSTCOPY)
        backoff = self._around.settings.limits.reconnect_initial_seconds
        first = True
        while True:
            try:
                await self._peer().commit()
                break
            except FerryError as error:
                if error.reason is Reason.NEVER_RAN or (first and error.reason is Reason.UNKNOWN_MIGRATION):
                    # It cannot have run there: no commit before this one was heard.
                    self._committed = False
                    raise
                first = False
                record.trouble(error)
                _log.warning("commit_unanswered", migration=record.migration_id, detail=error.message)
            if self._completed.is_set():
                break
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._around.settings.limits.reconnect_max_seconds)
        record.trouble(None)
        if self._paused_at is not None:
            record.downtime = time.monotonic() - self._paused_at
        record.changes.notify()
        _log.info("guest_handed_over", migration=record.migration_id, guest=record.guest_id, downtime=record.downtime)

    async def _see_through(self) -> None:
        """Serve until the destination has said that it has everything; then end the VMM here."""
        following = asyncio.create_task(self._following.follow(self._peer()))
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
        await self._around.guests.forget(self._guest)
        self.record.error = None
        self.record.lifecycle.to(State.COMPLETED)
        _log.info("migration_completed", migration=self.record.migration_id, guest=self.record.guest_id)

    async def _end_vmm(self) -> None:
        """End the VMM that the guest has left. Whether it goes or not, the guest is whole at the destination."""
        try:
            await self._guest.driver.kill()
        except FerryError as error:
            _log.warning("vmm_not_killed", migration=self.record.migration_id, detail=error.message)

    # When it goes wrong

    async def _fail(self, error: FerryError) -> None:
        if self._committed:
            # The guest may have run at the destination: it is not run here again, and its VMM stays as it is.
            self.record.fail(error)
            self._guest.migration_id = None
            _log.error("migration_failed", migration=self.record.migration_id, detail=error.message)
        else:
            await self._undo(error, State.FAILED)

    async def _undo(self, error: FerryError, state: State) -> None:
        """The guest never ran at the destination: have that give up, and let the guest go on here."""
        record = self.record
        self._undoing = True
        _log.warning("migration_undone", migration=record.migration_id, reason=error.reason.value, detail=error.message)
        self._pages.withdraw(record.migration_id)
        if self._paused_at is not None:
            error = await self._take_back(error)
        if self._destination is not None:
            try:
                await self._destination.abort(error.message)
            except FerryError as refusal:
                _log.info("abort_unanswered", migration=record.migration_id, detail=refusal.message)
        self._guest.migration_id = None
        if not record.state.final:
            record.trouble(error)
            record.lifecycle.to(state)

    async def _take_back(self, error: FerryError) -> FerryError:
        try:
            await self._guest.driver.resume()
        except FerryError as stuck:
            return FerryError(error.reason, f"{error.message}; and the guest could not be resumed: {stuck.message}")
        return error

    async def _let_go(self) -> None:
        # The page service keeps what is left of it: a destination may have missed the answer to its Complete.
        if self.served is not None:
            self.served.close()
        # gRPC keeps a closed channel's connection for as long as anybody refers to the channel.
        destination, self._destination = self._destination, None
        if destination is not None:
            await destination.close()

    def _peer(self) -> Destination:
        if self._destination is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self.record.migration_id} has no destination yet")
        return self._destination
