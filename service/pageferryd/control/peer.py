"""The destination's sidecar, as the source calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import incoming_pb2, incoming_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pageferry.tls import TlsFiles
    from pageferry.v1 import memory_pb2, migration_pb2

PROTOCOL_VERSION = 1
_QUICK_SECONDS = 10.0
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Destination:
    """Calls of IncomingService. Errors: DESTINATION_UNREACHABLE, or the reason that the destination gave."""

    def __init__(self, address: str, name: str, tls: TlsFiles | None, migration_id: str) -> None:
        self._address = address
        self._migration_id = migration_id
        self._channel = open_channel(address, tls, name)
        self._stub = incoming_pb2_grpc.IncomingServiceStub(self._channel)

    async def probe(self, guest_id: str) -> incoming_pb2.ProbeResponse:
        """Ask who and what the destination is. FerryError(PROTOCOL_MISMATCH) where it speaks another version."""
        request = incoming_pb2.ProbeRequest(protocol_version=PROTOCOL_VERSION, guest_id=guest_id)
        answer: incoming_pb2.ProbeResponse = await self._call(self._stub.Probe, request, _QUICK_SECONDS)
        if answer.protocol_version != PROTOCOL_VERSION:
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                f"the destination at {self._address} (pageferryd {answer.release}) speaks protocol "
                f"{answer.protocol_version}, this one {PROTOCOL_VERSION}: run the same release on both hosts",
            )
        return answer

    async def prepare(self, request: incoming_pb2.PrepareRequest, seconds: float) -> None:
        """Have the destination's VMM readied."""
        await self._call(self._stub.Prepare, request, seconds)

    async def hand_over(self, state: bytes, layout: memory_pb2.MemoryLayout | None, seconds: float) -> None:
        """Have the device state loaded; `layout` is the memory's, where `prepare` could not tell it."""
        request = incoming_pb2.HandOverRequest(migration_id=self._migration_id, state=state, layout=layout)
        await self._call(self._stub.HandOver, request, seconds)

    async def commit(self) -> None:
        """Make the destination the guest's owner."""
        await self._call(self._stub.Commit, incoming_pb2.CommitRequest(migration_id=self._migration_id), _QUICK_SECONDS)

    async def abort(self, reason: str) -> None:
        """Have the destination give up."""
        request = incoming_pb2.AbortRequest(migration_id=self._migration_id, reason=reason)
        await self._call(self._stub.Abort, request, _QUICK_SECONDS)

    async def describe_handover(self) -> migration_pb2.HandoverView:
        """Ask what it knows of the guest's owner: of either end, the other one may ask."""
        request = incoming_pb2.DescribeHandoverRequest(migration_id=self._migration_id)
        answer: incoming_pb2.DescribeHandoverResponse = await self._call(
            self._stub.DescribeHandover, request, _QUICK_SECONDS
        )
        return answer.view

    async def reconnect(self) -> None:
        """Have a paused destination try again now."""
        request = incoming_pb2.ReconnectRequest(migration_id=self._migration_id)
        await self._call(self._stub.Reconnect, request, _QUICK_SECONDS)

    async def limit(self, limits: migration_pb2.Limits) -> None:
        """Put limits into force."""
        request = incoming_pb2.LimitRequest(migration_id=self._migration_id, limits=limits)
        await self._call(self._stub.Limit, request, _QUICK_SECONDS)

    async def reports(self) -> AsyncGenerator[migration_pb2.Migration, None]:
        """Follow the migration as the destination sees it; ends when the stream does, which says nothing by itself."""
        call = self._stub.Report(incoming_pb2.ReportRequest(migration_id=self._migration_id))
        try:
            # Not `async for`: left early, its iterator and the call keep each other, and the connection, alive.
            while isinstance(response := await call.read(), incoming_pb2.ReportResponse):
                yield response.migration
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Let the connection go."""
        await self._channel.close()

    async def _call(self, method: Any, request: Any, seconds: float) -> Any:
        try:
            return await method(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.aio.AioRpcError) -> FerryError:
        fallback = Reason.DESTINATION_UNREACHABLE if error.code() in _UNREACHABLE else Reason.DESTINATION_REFUSED
        told = from_rpc(error, fallback)
        if told.reason is Reason.DESTINATION_UNREACHABLE:
            return FerryError(told.reason, f"the destination at {self._address} cannot be reached: {told.message}")
        return FerryError(told.reason, f"the destination at {self._address} refuses: {told.message}")
