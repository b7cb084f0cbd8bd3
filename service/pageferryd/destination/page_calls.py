"""The calls of PageService that every carrier of lanes makes over gRPC: the layout, opaque pages, the completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import page_pb2, page_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferryd.core.layout import Layout

# Longer than the source gives its VMM, which then says what is wrong there.
_EXPORT_SECONDS = 40.0
_COMPLETE_SECONDS = 10.0

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Source:
    """Where and whose the pages are: what PrepareRequest tells. `lane_address` is empty where there are no sockets.

    With `checksums` its pages must carry them.
    """

    migration_id: str
    address: str
    name: str
    token: bytes
    layout: Layout
    lane_address: str = ""
    checksums: bool = False


class PageCalls:
    """Calls on one channel, which remains the caller's."""

    def __init__(self, source: Source, channel: grpc.aio.Channel) -> None:
        self.source = source
        self.metadata: Metadata = (
            ("pageferry-migration", source.migration_id),
            ("pageferry-token-bin", source.token),
        )
        self._stub = page_pb2_grpc.PageServiceStub(channel)  # type: ignore[no-untyped-call,unused-ignore]

    async def check_layout(self, seconds: float) -> None:
        """Raise FerryError(LAYOUT_MISMATCH) unless the source serves the memory that it announced."""
        answer = await self._unary(self._stub.GetLayout, page_pb2.GetLayoutRequest(), seconds)
        regions = [(region.guest_address, region.size) for region in answer.layout.regions]
        if regions != [(region.guest_address, region.size) for region in self.source.layout.regions]:
            raise FerryError(
                Reason.LAYOUT_MISMATCH, f"{self.source.address} serves another memory layout than it announced"
            )

    async def export(self, pages: Sequence[int]) -> Sequence[page_pb2.PageBundle]:
        """Ask for opaque pages."""
        answer = await self._unary(self._stub.ExportPages, page_pb2.ExportPagesRequest(pages=pages), _EXPORT_SECONDS)
        bundles: Sequence[page_pb2.PageBundle] = answer.bundles
        return bundles

    async def complete(self, pages: int) -> None:
        """Tell the source that all is installed."""
        await self._unary(self._stub.Complete, page_pb2.CompleteRequest(pages=pages), _COMPLETE_SECONDS)

    def let_go(self) -> None:
        """Forget the channel: gRPC keeps a closed one's connection for as long as anybody refers to it."""
        self.__dict__.pop("_stub", None)

    async def guard(self, awaitable: Any) -> Any:
        """Await something of gRPC; what it fails with is raised as FerryError."""
        try:
            return await awaitable
        except grpc.aio.AioRpcError as error:
            raise self.explain(error) from error
        except TimeoutError as error:
            raise FerryError(Reason.SOURCE_UNREACHABLE, f"{self.source.address} does not answer") from error

    def explain(self, error: grpc.aio.AioRpcError) -> FerryError:
        """Return what an error of gRPC means here."""
        unavailable = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return told(self.source, from_rpc(error, Reason.SOURCE_UNREACHABLE if unavailable else Reason.LANE_LOST))

    async def _unary(self, call: Any, request: Any, seconds: float) -> Any:
        return await self.guard(call(request, metadata=self.metadata, timeout=seconds))


def told(source: Source, error: FerryError) -> FerryError:
    """Return an error of the source as one of this end."""
    # At this end the reason would mean the VMM of this host.
    reason = Reason.SOURCE_LOST if error.reason is Reason.VMM_GONE else error.reason
    return FerryError(reason, f"source {source.name} at {source.address}: {error.message}")
