"""Lanes over gRPC: each on a channel of its own, messages as raw bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason
from pageferryd.core.requests import encode_request
from pageferryd.destination.page_calls import PageCalls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferry.tls import TlsFiles
    from pageferry.v1 import page_pb2
    from pageferryd.destination.page_calls import Metadata, Source

FETCH = "/pageferry.v1.PageService/FetchPages"
PUSH = "/pageferry.v1.PageService/PushPages"
# Left to gRPC's defaults a stream buffers 64 KiB before its reader is asked.
_PUSH_OPTIONS = (("grpc.http2.lookahead_bytes", 4 << 20),)

_Stream = grpc.aio.StreamStreamCall[bytes, bytes]


class GrpcLanes:
    """Two streams of PageService."""

    def __init__(self, source: Source, demand: grpc.aio.Channel, push: grpc.aio.Channel) -> None:
        self.checksums = source.checksums
        self._source = source
        self._channels: tuple[grpc.aio.Channel, ...] = (demand, push)
        self._calls = PageCalls(source, demand)
        # Beside the push lane: bundles are large.
        self._large_calls = PageCalls(source, push)
        self._demand_stream: _Stream
        self._push_stream: _Stream

    async def start(self, seconds: float) -> None:
        """Check the layout at the source, then open both streams."""
        await self._calls.check_layout(seconds)
        demand, push = self._channels
        self._demand_stream = _open_stream(demand, FETCH, self._calls.metadata)
        self._push_stream = _open_stream(push, PUSH, self._calls.metadata)
        await self._calls.guard(asyncio.wait_for(self._both_connected(), seconds))

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
        """Ask beside the push lane."""
        return await self._large_calls.export(pages)

    async def complete(self, pages: int) -> None:
        """Tell the source."""
        await self._calls.complete(pages)

    async def close(self) -> None:
        """Close both channels, and their streams with them."""
        channels, self._channels = self._channels, ()
        await asyncio.gather(*(channel.close() for channel in channels))
        # gRPC keeps a closed channel's connection for as long as anybody refers to it, and errors refer to these lanes.
        for name in ("_demand_stream", "_push_stream"):
            self.__dict__.pop(name, None)
        self._calls.let_go()
        self._large_calls.let_go()

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

    async def _loss(self, stream: _Stream, error: BaseException | None) -> FerryError:
        """Return what the end of a stream means: nothing but a loss, unless the source gave a reason of its own."""
        if isinstance(error, grpc.aio.AioRpcError):
            return self._calls.explain(error)
        code = await stream.code() if stream.done() else None
        if code not in (None, grpc.StatusCode.OK):
            status = grpc.aio.AioRpcError(
                code, await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
            )
            return self._calls.explain(status)
        return FerryError(Reason.LANE_LOST, f"{self._source.address} ended a lane")


def _is_cancelled(task: asyncio.Task[Any] | None) -> bool:
    return task is None or task.cancelling() > 0


def _open_stream(channel: grpc.aio.Channel, method: str, metadata: Metadata) -> _Stream:
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
