"""A destination's sidecar over a real socket, that waits, fails or loses its answers where a test says so."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
from stand_in_vmm import Gate

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, incoming_pb2_grpc, migration_pb2, page_pb2, page_pb2_grpc
from pageferryd.control.peer import PROTOCOL_VERSION

STATES = migration_pb2.MigrationState


class StandInDestination(incoming_pb2_grpc.IncomingServiceServicer):
    """`failures[method]` is raised before it does anything, `lost[method]` after it has: its answer never comes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, FerryError] = {}
        self.lost: dict[str, FerryError] = {}
        self.gates: dict[str, Gate] = defaultdict(Gate)
        self.gated: set[str] = set()
        self.prepared: incoming_pb2.PrepareRequest | None = None
        self.state: bytes | None = None
        self.runs = False
        self.aborted = False
        self.protocol = PROTOCOL_VERSION
        self.view = migration_pb2.HandoverView()
        """What it tells of the guest's owner."""
        self.reports: asyncio.Queue[Any] = asyncio.Queue()

    def gate(self, method: str) -> Gate:
        self.gated.add(method)
        return self.gates[method]

    async def _begin(self, method: str) -> None:
        self.calls.append(method)
        if method in self.gated:
            await self.gates[method].passed()
        if method in self.failures:
            raise self.failures[method]

    async def _end(self, method: str) -> None:
        if method in self.lost:
            raise self.lost[method]

    async def Probe(self, request: Any, context: Any) -> Any:
        await self._begin("Probe")
        return incoming_pb2.ProbeResponse(protocol_version=self.protocol, release="1", host="b")

    async def Prepare(self, request: Any, context: Any) -> Any:
        await self._begin("Prepare")
        self.prepared = request
        await self._end("Prepare")
        return incoming_pb2.PrepareResponse()

    async def HandOver(self, request: Any, context: Any) -> Any:
        await self._begin("HandOver")
        self.state = request.state
        await self._end("HandOver")
        return incoming_pb2.HandOverResponse()

    async def Commit(self, request: Any, context: Any) -> Any:
        await self._begin("Commit")
        if self.aborted:
            raise FerryError(Reason.NEVER_RAN, "it was aborted")
        self.runs = True
        await self._end("Commit")
        return incoming_pb2.CommitResponse()

    async def Abort(self, request: Any, context: Any) -> Any:
        await self._begin("Abort")
        if self.runs:
            raise FerryError(Reason.ALREADY_COMMITTED, "it runs")
        self.aborted = True
        return incoming_pb2.AbortResponse()

    async def Report(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._begin("Report")
        while (migration := await self.reports.get()) is not None:
            yield incoming_pb2.ReportResponse(migration=migration)

    async def Reconnect(self, request: Any, context: Any) -> Any:
        await self._begin("Reconnect")
        return incoming_pb2.ReconnectResponse()

    async def DescribeHandover(self, request: Any, context: Any) -> Any:
        await self._begin("DescribeHandover")
        return incoming_pb2.DescribeHandoverResponse(view=self.view)

    async def Limit(self, request: Any, context: Any) -> Any:
        await self._begin("Limit")
        return incoming_pb2.LimitResponse()

    def report(self, state: int, reason: str = "") -> None:
        migration = migration_pb2.Migration(state=migration_pb2.MigrationState.ValueType(state))
        if reason:
            migration.error.CopyFrom(migration_pb2.ErrorDetail(reason=reason, message="as the test says"))
        self.reports.put_nowait(migration)

    async def complete(self) -> None:
        """Say to the source's page service that every page is here."""
        assert self.prepared is not None
        prepared = self.prepared
        pages = sum(region.size for region in prepared.layout.regions) // 4096
        channel = open_channel(prepared.page_address, None)
        try:
            await page_pb2_grpc.PageServiceStub(channel).Complete(
                page_pb2.CompleteRequest(pages=pages),
                metadata=(("pageferry-migration", prepared.migration_id), ("pageferry-token-bin", prepared.token)),
                timeout=10,
            )
        finally:
            await channel.close()

    async def can_fetch(self) -> bool:
        """Say whether the source gives a page out."""
        assert self.prepared is not None
        prepared = self.prepared
        channel = open_channel(prepared.page_address, None)
        call = page_pb2_grpc.PageServiceStub(channel).FetchPages(
            metadata=(("pageferry-migration", prepared.migration_id), ("pageferry-token-bin", prepared.token))
        )
        try:
            await call.write(page_pb2.FetchPagesRequest(first_pages=[0], page_counts=[1]))
            return await call.read() is not grpc.aio.EOF
        except grpc.aio.AioRpcError:
            return False
        finally:
            await channel.close()
