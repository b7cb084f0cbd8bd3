"""A gRPC server as the sidecar's, with servicers that a test directs, and ways to call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pageferry.channel import open_channel
from pageferry.errors import Reason, from_rpc
from pageferry.tls import TlsFiles
from pageferry.v1 import (
    incoming_pb2,
    incoming_pb2_grpc,
    migration_pb2,
    migration_pb2_grpc,
    page_pb2,
    page_pb2_grpc,
)
from pageferryd.access import make_refusals
from pageferryd.config import Settings, Tls
from pageferryd.server import GrpcServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Migrations(migration_pb2_grpc.MigrationServiceServicer):
    """Does what a test says when its methods are called."""

    failure: BaseException | None = None

    async def GetMigration(self, request: Any, context: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        return migration_pb2.GetMigrationResponse()

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield migration_pb2.WatchMigrationResponse()
        if self.failure is not None:
            raise self.failure
        yield migration_pb2.WatchMigrationResponse()


class Incoming(incoming_pb2_grpc.IncomingServiceServicer):
    async def Probe(self, request: Any, context: Any) -> Any:
        return incoming_pb2.ProbeResponse(host="b")


class Pages(page_pb2_grpc.PageServiceServicer):
    """A page service in the coroutine style, with `read` and `write` and with an iterator."""

    failure: BaseException | None = None

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def FetchPages(self, requests: Any, context: Any) -> None:
        try:
            async for _ in requests:
                await context.write(page_pb2.FetchPagesResponse())
                if self.failure is not None:
                    raise self.failure
        finally:
            self.left.set()

    async def GetLayout(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")


class Sidecar:
    """A started server with servicers of the test, and ways to call it."""

    def __init__(self, settings: Settings) -> None:
        self.refusals = make_refusals()
        self.grpc = GrpcServer(settings, self.refusals)
        self.migrations, self.pages = Migrations(), Pages()
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(self.migrations, self.grpc.server)
        incoming_pb2_grpc.add_IncomingServiceServicer_to_server(Incoming(), self.grpc.server)
        page_pb2_grpc.add_PageServiceServicer_to_server(self.pages, self.grpc.server)
        self.bound: list[str] = []
        self.channels: list[grpc.aio.Channel] = []

    def channel(self, files: TlsFiles | None = None, name: str | None = None, address: str = "") -> grpc.aio.Channel:
        channel = open_channel(address or self.bound[0], files, name)
        self.channels.append(channel)
        return channel

    async def stop(self) -> None:
        for channel in self.channels:
            await channel.close()
        await self.grpc.stop(0)


Start = Callable[..., Awaitable[Sidecar]]


def tls_settings(files: TlsFiles, **more: Any) -> dict[str, Any]:
    return {"tls": Tls(ca=files.ca, certificate=files.certificate, key=files.key), **more}


async def get_migration(channel: grpc.aio.Channel) -> Any:
    return await migration_pb2_grpc.MigrationServiceStub(channel).GetMigration(
        migration_pb2.GetMigrationRequest(), timeout=10
    )


async def probe(channel: grpc.aio.Channel) -> Any:
    return await incoming_pb2_grpc.IncomingServiceStub(channel).Probe(incoming_pb2.ProbeRequest(), timeout=10)


async def get_layout(channel: grpc.aio.Channel) -> Any:
    return await page_pb2_grpc.PageServiceStub(channel).GetLayout(page_pb2.GetLayoutRequest(), timeout=10)


async def health(channel: grpc.aio.Channel, service: str = "") -> Any:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return answer.status


async def error_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, Reason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    ours = from_rpc(raised.value, Reason.SIDECAR_UNREACHABLE)
    return raised.value.code(), ours.reason, ours.message
