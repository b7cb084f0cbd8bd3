"""Lanes over gRPC: each on a channel of its own, messages as raw bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import page_pb2, page_pb2_grpc
from pageferryd.core.requests import encode_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.tls import TlsFiles
    from pageferryd.core.layout import Layout

FETCH = "/pageferry.v1.PageService/FetchPages"
PUSH = "/pageferry.v1.PageService/PushPages"
# Longer than the source gives its VMM, which then says what is wrong there.
_EXPORT_SECONDS = 40.0
# Left to gRPC's defaults a stream buffers 64 KiB before its reader is asked.
_PUSH_OPTIONS = (("grpc.http2.lookahead_bytes", 4 << 20),)

_Stream = grpc.aio.StreamStreamCall[bytes, bytes]
_Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Source:
    """Where and whose the pages are: what PrepareRequest tells."""

    migration_id: str
    address: str
    name: str
    token: bytes
    layout: Layout


class GrpcLanes:
    """Two streams of PageService."""

    def __init__(self, source: Source, demand: grpc.aio.Channel, push: grpc.aio.Channel) -> None:
        self._source = source
        self._channels: tuple[grpc.aio.Channel, ...] = (demand, push)
        self._metadata: _Metadata = (
            ("pageferry-migration", source.migration_id),
            ("pageferry-token-bin", source.token),
        )
        self._stub = page_pb2_grpc.PageServiceStub(demand)  # type: ignore[no-untyped-call,unused-ignore]
        self._push_stub = page_pb2_grpc.PageServiceStub(push)
        self._demand_stream: _Stream
        self._push_stream: _Stream

    async def start(self, seconds: float) -> None:
        """Check the layout at the source, then open both streams."""
        answer = await self._unary(self._stub.GetLayout, page_pb2.GetLayoutRequest(), seconds)
        regions = [(region.guest_address, region.size) for region in answer.layout.regions]
        if regions != [(region.guest_address, region.size) for region in self._source.layout.regions]:
            raise FerryError(
                Reason.LAYOUT_MISMATCH, f"{self._source.address} serves another memory layout than it announced"
            )
        demand, push = self._channels
        self._demand_stream = _open_stream(demand, FETCH, self._metadata)
        self._push_stream = _open_stream(push, PUSH, self._metadata)
        await self._guard(asyncio.wait_for(self._both_connected(), seconds))

    async def _both_connected(self) -> None:
        await self._demand_stream.wait_for_connection()
        await self._push_stream.wait_for_connection()

    async def fetch(self, runs: Sequence[tuple[int, int]]) -> None:
        """Ask on the demand lane."""
        try:
            await self._demand_stream.write(encode_request(runs))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._loss(self._demand_stream, error) from error

    async def fetched(self) -> bytes:
        """Return the next answer of the demand lane."""
        return await self._read(self._demand_stream)

    async def push(self, runs: Sequence[tuple[int, int]], credit: int) -> None:
        """Ask on the push lane."""
        try:
            await self._push_stream.write(encode_request(runs, credit))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._loss(self._push_stream, error) from error

    async def pushed(self) -> bytes:
        """Return the next answer of the push lane."""
        return await self._read(self._push_stream)

    async def export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        """Ask beside the push lane: bundles are large."""
        request = page_pb2.ExportPagesRequest(pages=pages)
        answer = await self._unary(self._push_stub.ExportPages, request, _EXPORT_SECONDS)
        bundles: Sequence[page_pb2.PageBundle] = answer.bundles
        return bundles

    async def complete(self, pages: int) -> None:
        """Tell the source."""
        await self._unary(self._stub.Complete, page_pb2.CompleteRequest(pages=pages), 10.0)

    async def close(self) -> None:
        """Close both channels, and their streams with them."""
        channels, self._channels = self._channels, ()
        await asyncio.gather(*(channel.close() for channel in channels))
        # gRPC keeps a closed channel's connection for as long as anybody refers to it, and errors refer to these lanes.
        for name in ("_stub", "_push_stub", "_demand_stream", "_push_stream"):
            self.__dict__.pop(name, None)

    async def _read(self, stream: _Stream) -> bytes:
        try:
            message = await stream.read()
        except grpc.RpcError as error:
            raise await self._loss(stream, error) from error
        except asyncio.CancelledError:
            # gRPC says so, too, when the stream was closed and not the task cancelled.
            if _is_cancelled(asyncio.current_task()):
                raise
            raise FerryError(Reason.LANE_LOST, f"the lanes to {self._source.address} were closed") from None
        if isinstance(message, bytes):
            return message
        raise await self._loss(stream, None)

    async def _unary(self, call: Any, request: Any, seconds: float) -> Any:
        return await self._guard(call(request, metadata=self._metadata, timeout=seconds))

    async def _guard(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error
        except TimeoutError as error:
            raise FerryError(Reason.SOURCE_UNREACHABLE, f"{self._source.address} does not answer") from error

    async def _loss(self, stream: _Stream, error: BaseException | None) -> FerryError:
        """Return what the end of a stream means: nothing but a loss, unless the source gave a reason of its own."""
        if isinstance(error, grpc.aio.AioRpcError):
            return self._explain(error)
        code = await stream.code() if stream.done() else None
        if code not in (None, grpc.StatusCode.OK):
            status = grpc.aio.AioRpcError(
                code, await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
            )
            return self._explain(status)
        return FerryError(Reason.LANE_LOST, f"{self._source.address} ended a lane")

    def _explain(self, error: grpc.aio.AioRpcError) -> FerryError:
        unavailable = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        fallback = Reason.SOURCE_UNREACHABLE if unavailable else Reason.LANE_LOST
        told = from_rpc(error, fallback)
        # At this end the reason would mean the VMM of this host.
        reason = Reason.SOURCE_LOST if told.reason is Reason.VMM_GONE else told.reason
        return FerryError(reason, f"source {self._source.name} at {self._source.address}: {told.message}")


def _is_cancelled(task: asyncio.Task[Any] | None) -> bool:
    return task is None or task.cancelling() > 0


def _open_stream(channel: grpc.aio.Channel, method: str, metadata: _Metadata) -> _Stream:
    call: Any = channel.stream_stream(method, request_serializer=None, response_deserializer=None)
    stream: _Stream = call(metadata=metadata)
    return stream


class GrpcLaneOpener:
    """Opens gRPC lanes to one source, which must prove its name where certificates are in use."""

    def __init__(self, source: Source, tls: TlsFiles | None, seconds: float) -> None:
        self._source = source
        self._tls = tls
        self._seconds = seconds

    async def open(self) -> GrpcLanes:
        """Connect both lanes."""
        name = self._source.name
        demand = open_channel(self._source.address, self._tls, name)
        push = open_channel(self._source.address, self._tls, name, options=_PUSH_OPTIONS)
        lanes = GrpcLanes(self._source, demand, push)
        try:
            await lanes.start(self._seconds)
        except BaseException:
            await lanes.close()
            raise
        return lanes
