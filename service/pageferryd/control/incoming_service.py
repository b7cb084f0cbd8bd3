"""IncomingService: what sidecars of sources ask of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from pageferry import __version__
from pageferry.errors import FerryError, Reason
from pageferry.tls import peer_names
from pageferry.v1 import incoming_pb2, incoming_pb2_grpc, migration_pb2
from pageferryd.control.incoming import Incoming, given_up, never_ran
from pageferryd.control.limits import check_limits
from pageferryd.control.loss import check_policy
from pageferryd.control.peer import PROTOCOL_VERSION
from pageferryd.control.preflight import check_host
from pageferryd.control.record import MIGRATION_ID, MigrationRecord
from pageferryd.control.resolving import view_here
from pageferryd.control.watching import watch
from pageferryd.source.served import TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pageferryd.control.book import MigrationBook
    from pageferryd.control.drain import Drain
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.control.templates import VmmStarter

_Context = grpc.aio.ServicerContext[Any, Any]


class IncomingServicer(incoming_pb2_grpc.IncomingServiceServicer):
    """Each method finds its migration, checks that the caller is its source, and leaves the rest to it."""

    def __init__(self, book: MigrationBook, around: Surroundings, drain: Drain, starter: VmmStarter) -> None:
        self._book = book
        self._around = around
        self._drain = drain
        self._starter = starter

    async def Probe(  # noqa: N802 - the name in the contract
        self, request: incoming_pb2.ProbeRequest, context: _Context
    ) -> incoming_pb2.ProbeResponse:
        """Tell version, name and checks."""
        checks = await check_host(self._around.settings.runtime_dir)
        if request.guest_id:
            checks.append(await self._check_guest(request.guest_id))
        return incoming_pb2.ProbeResponse(
            protocol_version=PROTOCOL_VERSION, release=__version__, host=self._around.settings.host, checks=checks
        )

    async def _check_guest(self, guest_id: str) -> migration_pb2.Check:
        check = migration_pb2.Check(name="guest", status=migration_pb2.CHECK_STATUS_FAILED)
        drivers = self._starter.drivers(guest_id)
        if drivers and not self._around.guests.knows(guest_id):
            check.status = migration_pb2.CHECK_STATUS_OK
            check.detail = f"a VMM of kind {' or '.join(drivers)} would be started for guest {guest_id} by a template"
            return check
        try:
            guest = await self._around.guests.look(self._around.guests.get(guest_id))
        except FerryError as error:
            check.detail = error.message
            check.remedy = f"start a VMM that waits for guest {guest_id}, and register it at the destination"
            return check
        if guest.state == migration_pb2.GUEST_STATE_INCOMING:
            check.status = migration_pb2.CHECK_STATUS_OK
            check.detail = f"a VMM (process {guest.pid}) waits for guest {guest_id}"
        else:
            check.detail = f"guest {guest_id} is {migration_pb2.GuestState.Name(guest.state)}"
            check.remedy = "the destination needs a VMM in incoming mode"
        return check

    async def Prepare(  # noqa: N802
        self, request: incoming_pb2.PrepareRequest, context: _Context
    ) -> incoming_pb2.PrepareResponse:
        """Begin an incoming migration."""
        _check_prepare(request)
        _check_name(request.source_name, context)
        if request.protocol_version != PROTOCOL_VERSION:
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                f"the source speaks protocol {request.protocol_version}, this destination {PROTOCOL_VERSION} "
                f"(pageferryd {__version__}): run the same release on both hosts",
            )
        self._check_acceptable(request.migration_id)
        vmm = await self._starter.start(request.guest_id, request.driver)
        try:
            # Starting it took a while.
            self._check_acceptable(request.migration_id)
            incoming = self._begin(request)
        except BaseException:
            if vmm is not None:
                await self._starter.discard(vmm)
            raise
        if vmm is not None:
            self._starter.attend(vmm, incoming.record)
        await incoming.prepare(request)
        return incoming_pb2.PrepareResponse()

    def _check_acceptable(self, migration_id: str) -> None:
        self._drain.check()
        self._book.check_room()
        self._book.check_incoming_room(self._around.settings.limits.max_incoming)
        if self._book.knows(migration_id):
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {migration_id} is known here already")

    def _begin(self, request: incoming_pb2.PrepareRequest) -> Incoming:
        record = MigrationRecord.of_arriving(request, self._around.settings.host)
        guest = self._around.guests.claim(request.guest_id, request.migration_id)
        incoming = Incoming(record, guest, self._around)
        self._book.add(incoming)
        return incoming

    async def HandOver(  # noqa: N802
        self, request: incoming_pb2.HandOverRequest, context: _Context
    ) -> incoming_pb2.HandOverResponse:
        """Load the state."""
        await self._find(request.migration_id, context).hand_over(request)
        return incoming_pb2.HandOverResponse()

    async def Commit(  # noqa: N802
        self, request: incoming_pb2.CommitRequest, context: _Context
    ) -> incoming_pb2.CommitResponse:
        """Run the guest."""
        incoming = self._find(request.migration_id, context)
        self._starter.keep(request.migration_id)
        await incoming.commit()
        return incoming_pb2.CommitResponse()

    async def Abort(  # noqa: N802
        self, request: incoming_pb2.AbortRequest, context: _Context
    ) -> incoming_pb2.AbortResponse:
        """Give up."""
        if not self._book.knows(request.migration_id) and self._forget(request.migration_id, context):
            return incoming_pb2.AbortResponse()
        await self._find(request.migration_id, context).abort(request.reason[:512])
        return incoming_pb2.AbortResponse()

    async def Report(  # noqa: N802
        self, request: incoming_pb2.ReportRequest, context: _Context
    ) -> AsyncIterator[incoming_pb2.ReportResponse]:
        """Follow."""
        async for migration in watch(self._find(request.migration_id, context)):
            yield incoming_pb2.ReportResponse(migration=migration)

    async def Reconnect(  # noqa: N802
        self, request: incoming_pb2.ReconnectRequest, context: _Context
    ) -> incoming_pb2.ReconnectResponse:
        """Try again now."""
        self._find(request.migration_id, context).reconnect()
        return incoming_pb2.ReconnectResponse()

    async def Limit(  # noqa: N802
        self, request: incoming_pb2.LimitRequest, context: _Context
    ) -> incoming_pb2.LimitResponse:
        """Put limits into force."""
        check_limits(request.limits)
        self._find(request.migration_id, context).limit(request.limits)
        return incoming_pb2.LimitResponse()

    async def DescribeHandover(  # noqa: N802
        self, request: incoming_pb2.DescribeHandoverRequest, context: _Context
    ) -> incoming_pb2.DescribeHandoverResponse:
        """Tell what is known of the guest's owner."""
        if not self._book.knows(request.migration_id):
            return incoming_pb2.DescribeHandoverResponse(view=self._remembered(request.migration_id, context))
        mover = self._book.get(request.migration_id)
        record = mover.record
        _check_name(record.source_name if isinstance(mover, Incoming) else record.destination_name, context)
        return incoming_pb2.DescribeHandoverResponse(view=await view_here(mover, self._around.settings.host))

    def _remembered(self, migration_id: str, context: _Context) -> migration_pb2.HandoverView:
        """Tell of a guest that never ran here, or was lost, under an earlier sidecar."""
        view = migration_pb2.HandoverView(
            role=migration_pb2.ROLE_DESTINATION, host=self._around.settings.host, reachable=True
        )
        try:
            self._refuse_remembered(migration_id, context)
        except FerryError as told:
            if told.reason is Reason.PEER_NOT_ALLOWED:
                raise
            view.known = True
            view.state = migration_pb2.MIGRATION_STATE_FAILED
            # A note that nobody can read may say that the guest is this host's.
            view.handed_over = told.reason is Reason.JOURNAL_UNREADABLE
            view.detail = told.message
        return view

    def _refuse_remembered(self, migration_id: str, context: _Context) -> None:
        """Raise what a source is told of a migration that ended here, or that cannot be known, if there is a note."""
        if not MIGRATION_ID.fullmatch(migration_id):
            return
        arrivals = self._around.journal.arrivals
        if arrivals.unreadable(migration_id):
            raise FerryError(
                Reason.JOURNAL_UNREADABLE,
                f"migration {migration_id}: what this host has noted of it cannot be read, so whether the guest is its "
                "own cannot be known: an operator must decide (pageferry resolve)",
            )
        never, lost = arrivals.ended_before(migration_id), arrivals.was_lost(migration_id)
        if never is not None:
            _check_name(never.source_name, context)
            raise never_ran(migration_id, "")
        if lost is not None:
            _check_name(lost.source_name, context)
            raise given_up(migration_id, "")

    def _forget(self, migration_id: str, context: _Context) -> bool:
        """Forget a guest that never ran here, as its source knows now; return whether there was one."""
        if not MIGRATION_ID.fullmatch(migration_id):
            return False
        never = self._around.journal.arrivals.ended_before(migration_id)
        if never is None:
            return False
        _check_name(never.source_name, context)
        self._around.journal.arrivals.completed(migration_id)
        return True

    def _find(self, migration_id: str, context: _Context) -> Incoming:
        if not self._book.knows(migration_id):
            self._refuse_remembered(migration_id, context)
        incoming = self._book.incoming(migration_id)
        _check_name(incoming.record.source_name, context)
        return incoming


def _check_name(source_name: str, context: _Context) -> None:
    """Raise FerryError(PEER_NOT_ALLOWED) unless the caller is the source, where callers prove their names."""
    names = peer_names(context)
    if names and source_name.lower() not in names:
        raise FerryError(Reason.PEER_NOT_ALLOWED, f"this migration comes from {source_name}, not from this peer")


def _check_prepare(request: incoming_pb2.PrepareRequest) -> None:
    check_limits(request.limits)
    check_policy(request.policy)
    if not MIGRATION_ID.fullmatch(request.migration_id):
        raise FerryError(Reason.INVALID_ARGUMENT, "migration_id must be 1 to 32 letters and digits of ASCII")
    if len(request.token) != TOKEN_BYTES:
        raise FerryError(Reason.INVALID_ARGUMENT, f"token must have {TOKEN_BYTES} bytes")
    if not request.source_name or not request.page_address:
        raise FerryError(Reason.INVALID_ARGUMENT, "source_name and page_address must be given")
