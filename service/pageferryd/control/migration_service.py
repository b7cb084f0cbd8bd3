"""MigrationService: what operators and orchestrators ask of this sidecar."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import grpc

from pageferry import __version__
from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2, migration_pb2_grpc
from pageferryd.control.departure import PageAddresses
from pageferryd.control.incoming import Incoming
from pageferryd.control.limits import check_limits
from pageferryd.control.loss import check_policy
from pageferryd.control.outgoing import Outgoing
from pageferryd.control.peer import Destination
from pageferryd.control.preflight import check_host
from pageferryd.control.record import MigrationRecord
from pageferryd.control.resolving import resolve
from pageferryd.control.watching import watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pageferryd.control.book import MigrationBook
    from pageferryd.control.drain import Drain
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.source.page_service import PageService

_Context = grpc.aio.ServicerContext[Any, Any]
_MAX_ID = 128


class MigrationServicer(migration_pb2_grpc.MigrationServiceServicer):
    """The API. `page_addresses` returns where destinations reach this sidecar's page service."""

    def __init__(
        self,
        book: MigrationBook,
        around: Surroundings,
        pages: PageService,
        page_addresses: Callable[[], PageAddresses],
        drain: Drain,
    ) -> None:
        self._book = book
        self._around = around
        self._pages = pages
        self._page_addresses = page_addresses
        self._drain = drain

    async def Preflight(  # noqa: N802 - the name in the contract
        self, request: migration_pb2.PreflightRequest, context: _Context
    ) -> migration_pb2.PreflightResponse:
        """Check this host, and a guest and a destination where they are named."""
        response = migration_pb2.PreflightResponse(
            release=__version__, checks=await check_host(self._around.settings.runtime_dir)
        )
        if request.guest_id:
            response.checks.append(await self._check_guest(request.guest_id))
        if request.destination_address:
            response.destination_checks.extend(await self._check_destination(request))
        return response

    async def _check_guest(self, guest_id: str) -> migration_pb2.Check:
        check = migration_pb2.Check(name="guest", status=migration_pb2.CHECK_STATUS_FAILED)
        try:
            guest = await self._around.guests.look(self._around.guests.get(guest_id))
        except FerryError as error:
            check.detail, check.remedy = error.message, "start the guest's VMM and register it"
            return check
        if not guest.movable:
            check.detail = f"guest {guest_id} cannot be moved now: {'; '.join(guest.obstacles)}"
            check.remedy = "remove what is in the way"
            return check
        check.status = migration_pb2.CHECK_STATUS_OK
        check.detail = f"guest {guest_id}: process {guest.pid}, {guest.memory_bytes >> 20} MiB"
        return check

    async def _check_destination(self, request: migration_pb2.PreflightRequest) -> list[migration_pb2.Check]:
        try:
            address, name = self._destination(request.destination_address, request.destination_name)
            destination = Destination(address, name, self._around.tls, "")
            try:
                return list((await destination.probe(request.guest_id)).checks)
            finally:
                await destination.close()
        except FerryError as error:
            failed = migration_pb2.Check(
                name="destination",
                status=migration_pb2.CHECK_STATUS_FAILED,
                detail=error.message,
                remedy="check address, name, certificates and that pageferryd runs there",
            )
            return [failed]

    async def RegisterGuest(  # noqa: N802
        self, request: migration_pb2.RegisterGuestRequest, context: _Context
    ) -> migration_pb2.RegisterGuestResponse:
        """Register."""
        guest = await self._around.guests.register(request.guest_id, request.driver, request.vmm_address)
        return migration_pb2.RegisterGuestResponse(guest=guest)

    async def UnregisterGuest(  # noqa: N802
        self, request: migration_pb2.UnregisterGuestRequest, context: _Context
    ) -> migration_pb2.UnregisterGuestResponse:
        """Forget."""
        await self._around.guests.unregister(request.guest_id)
        return migration_pb2.UnregisterGuestResponse()

    async def ListGuests(  # noqa: N802
        self, request: migration_pb2.ListGuestsRequest, context: _Context
    ) -> migration_pb2.ListGuestsResponse:
        """List."""
        return migration_pb2.ListGuestsResponse(guests=await self._around.guests.list())

    async def StartMigration(  # noqa: N802
        self, request: migration_pb2.StartMigrationRequest, context: _Context
    ) -> migration_pb2.StartMigrationResponse:
        """Start, or return what the same request started before."""
        if not 0 < len(request.request_id) <= _MAX_ID:
            raise FerryError(Reason.INVALID_ARGUMENT, "request_id must have 1 to 128 characters: use a new UUID")
        check_limits(request.limits)
        check_policy(request.policy)
        address, name = self._destination(request.destination_address, request.destination_name)
        known = self._book.by_request(request.request_id)
        if known is not None:
            record = known.record
            asked = (request.guest_id, address, name or record.destination_name)
            if (record.guest_id, record.destination_address, record.destination_name) != asked:
                raise FerryError(
                    Reason.REQUEST_ID_REUSED,
                    f"request {request.request_id} started migration {record.migration_id} of guest {record.guest_id} "
                    f"to {record.destination_address}: use a new request_id",
                )
            return migration_pb2.StartMigrationResponse(migration=known.view())
        self._drain.check()
        self._book.check_room()
        return migration_pb2.StartMigrationResponse(migration=self._start(request, address, name).view())

    def _start(self, request: migration_pb2.StartMigrationRequest, address: str, name: str) -> Outgoing:
        record = MigrationRecord(
            migration_id=secrets.token_hex(8),
            request_id=request.request_id,
            guest_id=request.guest_id,
            role=migration_pb2.ROLE_SOURCE,
            source_name=self._around.settings.host,
            destination_name=name,
            destination_address=address,
            limits=request.limits,
            policy=request.policy,
        )
        guest = self._around.guests.claim(request.guest_id, record.migration_id)
        outgoing = Outgoing(record, guest, self._around, self._pages, self._page_addresses())
        self._book.add(outgoing)
        return outgoing

    def _destination(self, address: str, name: str) -> tuple[str, str]:
        """Return address and name, checked. Guest memory leaves the host only to a peer that proves its name."""
        address = addresses.normalise(address)
        if self._around.tls is None:
            if not addresses.is_loopback(address):
                raise FerryError(
                    Reason.INVALID_ARGUMENT,
                    f"{address} is not loopback, and this sidecar runs insecurely: give it certificates",
                )
            return address, name
        if not name:
            if addresses.is_unix(address):
                raise FerryError(
                    Reason.INVALID_ARGUMENT, "destination_name is empty: give the name in the destination's certificate"
                )
            name = addresses.split(address)[0]
        return address, name

    async def GetMigration(  # noqa: N802
        self, request: migration_pb2.GetMigrationRequest, context: _Context
    ) -> migration_pb2.GetMigrationResponse:
        """Show one."""
        return migration_pb2.GetMigrationResponse(migration=self._book.get(request.migration_id).view())

    async def ListMigrations(  # noqa: N802
        self, request: migration_pb2.ListMigrationsRequest, context: _Context
    ) -> migration_pb2.ListMigrationsResponse:
        """Show all."""
        response = migration_pb2.ListMigrationsResponse()
        for mover in self._book.newest_first():
            if request.guest_id in ("", mover.record.guest_id):
                migration = mover.view()
                migration.ClearField("memory_map")
                response.migrations.append(migration)
        return response

    async def WatchMigration(  # noqa: N802
        self, request: migration_pb2.WatchMigrationRequest, context: _Context
    ) -> AsyncIterator[migration_pb2.WatchMigrationResponse]:
        """Follow one."""
        async for migration in watch(self._book.get(request.migration_id)):
            yield migration_pb2.WatchMigrationResponse(migration=migration)

    async def CancelMigration(  # noqa: N802
        self, request: migration_pb2.CancelMigrationRequest, context: _Context
    ) -> migration_pb2.CancelMigrationResponse:
        """Take one back."""
        mover = self._book.get(request.migration_id)
        if isinstance(mover, Incoming):
            raise FerryError(
                Reason.ILLEGAL_STATE, f"migration {request.migration_id} comes to this host: cancel it at its source"
            )
        await mover.cancel()
        return migration_pb2.CancelMigrationResponse(migration=mover.view())

    async def ResumeMigration(  # noqa: N802
        self, request: migration_pb2.ResumeMigrationRequest, context: _Context
    ) -> migration_pb2.ResumeMigrationResponse:
        """Reconnect now."""
        mover = self._book.get(request.migration_id)
        if isinstance(mover, Incoming):
            mover.reconnect()
        else:
            await mover.reconnect()
        return migration_pb2.ResumeMigrationResponse(migration=mover.view())

    async def SetLimits(  # noqa: N802
        self, request: migration_pb2.SetLimitsRequest, context: _Context
    ) -> migration_pb2.SetLimitsResponse:
        """Put limits into force."""
        check_limits(request.limits)
        mover = self._book.get(request.migration_id)
        if isinstance(mover, Incoming):
            mover.limit(request.limits)
        else:
            await mover.limit(request.limits)
        return migration_pb2.SetLimitsResponse(migration=mover.view())

    async def ResolveMigration(  # noqa: N802
        self, request: migration_pb2.ResolveMigrationRequest, context: _Context
    ) -> migration_pb2.ResolveMigrationResponse:
        """Show what both ends know, and carry out a decision."""
        ends = await resolve(
            self._book.get(request.migration_id), request.decision, self._around, peer_fenced=request.peer_fenced
        )
        return migration_pb2.ResolveMigrationResponse(ends=ends)
