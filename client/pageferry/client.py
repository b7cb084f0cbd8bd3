"""The asynchronous client of a sidecar: its MigrationService, with deadlines, and with errors that name what to do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

import grpc

from pageferry import address as addresses
from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import migration_pb2 as pb
from pageferry.v1 import migration_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from types import TracebackType
    from typing import Self

    from pageferry.tls import TlsFiles
    from pageferry.v1.migration_pb2_grpc import MigrationServiceAsyncStub

CALL_SECONDS: Final = 30.0
"""How long a call may take where the caller does not say otherwise."""
DRIVER_VMM: Final = "vmm"
"""The driver of VMMs that serve VmmService."""
FINAL_STATES: Final = frozenset({pb.MIGRATION_STATE_COMPLETED, pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED})

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

# What a status of gRPC itself means, where no sidecar sent a reason of its own.
_BARE_REASONS: Final = {
    grpc.StatusCode.UNAVAILABLE: Reason.SIDECAR_UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.SIDECAR_UNREACHABLE,
    grpc.StatusCode.CANCELLED: Reason.SIDECAR_UNREACHABLE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.PROTOCOL_MISMATCH,
    grpc.StatusCode.UNAUTHENTICATED: Reason.PEER_NOT_ALLOWED,
    grpc.StatusCode.PERMISSION_DENIED: Reason.PEER_NOT_ALLOWED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
}


def ended(migration: pb.Migration) -> bool:
    """Tell whether the migration is over, well or not."""
    return migration.state in FINAL_STATES


class SidecarClient:
    """One sidecar. An asynchronous context manager, entered in the event loop that makes the calls.

    Every method raises FerryError: with the sidecar's own reason, or with SIDECAR_UNREACHABLE where none answered
    within `timeout` seconds.
    """

    def __init__(
        self, address: str, tls: TlsFiles | None, expected_name: str | None = None, *, timeout: float = CALL_SECONDS
    ) -> None:
        self.address = addresses.normalise(address)
        self._tls = tls
        self._expected_name = expected_name
        self._timeout = timeout
        self._channel: grpc.aio.Channel | None = None
        self._opened_stub: MigrationServiceAsyncStub | None = None

    async def __aenter__(self) -> Self:
        """Open the channel; it connects with the first call."""
        self._channel = open_channel(self.address, self._tls, self._expected_name)
        self._opened_stub = migration_pb2_grpc.MigrationServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel; watches that still go on end with it."""
        if self._channel is not None:
            await self._channel.close()
        self._channel = self._opened_stub = None

    async def preflight(
        self, guest_id: str = "", destination_address: str = "", destination_name: str = ""
    ) -> pb.PreflightResponse:
        """Return what the sidecar finds about its host, and about a guest and a destination where they are named."""
        request = pb.PreflightRequest(
            guest_id=guest_id, destination_address=destination_address, destination_name=destination_name
        )
        return await self._call(self._stub.Preflight, request)

    async def register_guest(self, guest_id: str, vmm_address: str, driver: str = DRIVER_VMM) -> pb.Guest:
        """Tell the sidecar of a guest, or of a VMM that waits for one; `vmm_address` is its Unix socket's path."""
        request = pb.RegisterGuestRequest(guest_id=guest_id, driver=driver, vmm_address=vmm_address)
        return (await self._call(self._stub.RegisterGuest, request)).guest

    async def unregister_guest(self, guest_id: str) -> None:
        """Make the sidecar forget a guest, which itself is not touched."""
        await self._call(self._stub.UnregisterGuest, pb.UnregisterGuestRequest(guest_id=guest_id))

    async def list_guests(self) -> Sequence[pb.Guest]:
        """Return the guests of this host, by id."""
        return (await self._call(self._stub.ListGuests, pb.ListGuestsRequest())).guests

    async def start_migration(
        self,
        guest_id: str,
        destination_address: str,
        *,
        request_id: str,
        destination_name: str = "",
        limits: pb.Limits | None = None,
        policy: pb.Policy | None = None,
    ) -> pb.Migration:
        """Begin to move a guest away. The same `request_id` again returns the same migration.

        Without a policy the sidecars' settings decide.
        """
        request = pb.StartMigrationRequest(
            request_id=request_id,
            guest_id=guest_id,
            destination_address=destination_address,
            destination_name=destination_name,
            limits=limits,
            policy=policy,
        )
        return (await self._call(self._stub.StartMigration, request)).migration

    async def get_migration(self, migration_id: str) -> pb.Migration:
        """Return one migration; ended ones stay readable for long."""
        return (await self._call(self._stub.GetMigration, pb.GetMigrationRequest(migration_id=migration_id))).migration

    async def list_migrations(self, guest_id: str = "") -> Sequence[pb.Migration]:
        """Return the migrations of a guest, or all, newest first and without their memory maps."""
        return (await self._call(self._stub.ListMigrations, pb.ListMigrationsRequest(guest_id=guest_id))).migrations

    async def cancel_migration(self, migration_id: str) -> pb.Migration:
        """Take a migration back, while its guest has not been handed over."""
        request = pb.CancelMigrationRequest(migration_id=migration_id)
        return (await self._call(self._stub.CancelMigration, request)).migration

    async def resume_migration(self, migration_id: str) -> pb.Migration:
        """Make a paused migration reconnect now."""
        request = pb.ResumeMigrationRequest(migration_id=migration_id)
        return (await self._call(self._stub.ResumeMigration, request)).migration

    async def set_limits(self, migration_id: str, limits: pb.Limits) -> pb.Migration:
        """Replace the limits of a migration that is under way, all of them."""
        request = pb.SetLimitsRequest(migration_id=migration_id, limits=limits)
        return (await self._call(self._stub.SetLimits, request)).migration

    async def resolve_migration(
        self,
        migration_id: str,
        decision: pb.Decision.ValueType = pb.DECISION_UNSPECIFIED,
        *,
        peer_fenced: bool = False,
    ) -> list[pb.HandoverView]:
        """Return what both ends know of a guest's owner, this sidecar's first, after carrying out a decision if any.

        `peer_fenced` says that the operator has made sure of the other end: the guest cannot run there any more, or
        never needs to. A call that fails with SIDECAR_UNREACHABLE may have been carried out all the same.
        """
        request = pb.ResolveMigrationRequest(migration_id=migration_id, decision=decision, peer_fenced=peer_fenced)
        return list((await self._call(self._stub.ResolveMigration, request)).ends)

    async def watch_migration(self, migration_id: str) -> AsyncGenerator[pb.Migration]:
        """Yield the migration now, with each change and a few times a second, up to the look that shows it ended.

        The first look has the deadline of a call, later ones have none: keepalive notices a sidecar that is gone. When
        the stream ends early, SIDECAR_UNREACHABLE is raised; the migration itself is not affected, and can be watched
        again. Close the iterator (`contextlib.aclosing`) when leaving it early.
        """
        call = self._stub.WatchMigration(pb.WatchMigrationRequest(migration_id=migration_id))
        deadline: float | None = self._timeout
        try:
            while True:
                async with asyncio.timeout(deadline):
                    look = await call.read()
                deadline = None
                if not isinstance(look, pb.WatchMigrationResponse):
                    raise self._watch_ended(migration_id)
                yield look.migration
                if ended(look.migration):
                    return
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error
        except TimeoutError as error:
            raise self._unreachable(f"no answer within {self._timeout:g} s") from error
        finally:
            call.cancel()

    @property
    def _stub(self) -> MigrationServiceAsyncStub:
        if self._opened_stub is None:
            raise RuntimeError("enter the SidecarClient with `async with` before calling it")
        return self._opened_stub

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        try:
            return await method(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.aio.AioRpcError) -> FerryError:
        found = from_rpc(error, _BARE_REASONS.get(error.code(), Reason.INTERNAL))
        # No sidecar sends this reason itself: the call never reached one, or its answer never came.
        if found.reason is Reason.SIDECAR_UNREACHABLE:
            return self._unreachable(found.message)
        if found.reason is Reason.PROTOCOL_MISMATCH and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return FerryError(
                found.reason,
                f"what answers at {self.address} does not know this call: {found.message}; is it a current pageferryd?",
            )
        return found

    def _unreachable(self, what: str) -> FerryError:
        checks = "that pageferryd runs there"
        if addresses.is_unix(self.address):
            checks += ", and that this user may open the socket"
        elif self._tls is None:
            checks += ", the address, and that it was started with --insecure too"
        else:
            checks += ", the address, firewalls, and that both certificates are of the same CA and bear the right names"
        return FerryError(Reason.SIDECAR_UNREACHABLE, f"no sidecar answers at {self.address} ({what}); check {checks}")

    def _watch_ended(self, migration_id: str) -> FerryError:
        return FerryError(
            Reason.SIDECAR_UNREACHABLE,
            f"the sidecar at {self.address} stopped telling about migration {migration_id} before its end, as when it "
            "shuts down; the migration is not affected, watch it again",
        )
