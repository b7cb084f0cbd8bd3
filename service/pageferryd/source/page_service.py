"""PageService: hands out the pages of guests that have left, to the one peer each was sent to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.errors import FerryError, Reason
from pageferry.tls import peer_names
from pageferry.v1 import memory_pb2, page_pb2
from pageferryd.core.errors import CoreError
from pageferryd.core.requests import MAX_FETCH_PAGES, decode_fetch, decode_push
from pageferryd.source.answers import PushAnswer, fetch, misbehaviour

if TYPE_CHECKING:
    from pageferryd.core.layout import Layout
    from pageferryd.source.served import Served

SERVICE = "pageferry.v1.PageService"
_Context = grpc.aio.ServicerContext[Any, Any]


class PageService:
    """The guests on offer, by migration."""

    def __init__(self, *, secure: bool) -> None:
        """`secure`: callers prove their names, and must be who the migration was started to."""
        self._secure = secure
        self._served: dict[str, Served] = {}

    def offer(self, served: Served) -> None:
        """Begin to serve a guest's memory."""
        self._served[served.migration_id] = served

    def withdraw(self, migration_id: str) -> None:
        """Stop to serve it, and let it go."""
        served = self._served.pop(migration_id, None)
        if served is not None:
            served.close()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods: those with pages in their messages without generated classes, which would copy them."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetLayout": grpc.unary_unary_rpc_method_handler(
                self.get_layout,
                request_deserializer=page_pb2.GetLayoutRequest.FromString,
                response_serializer=page_pb2.GetLayoutResponse.SerializeToString,
            ),
            "FetchPages": grpc.stream_stream_rpc_method_handler(self.fetch_pages),
            "PushPages": grpc.stream_stream_rpc_method_handler(self.push_pages),
            "ExportPages": grpc.unary_unary_rpc_method_handler(
                self.export_pages,
                request_deserializer=page_pb2.ExportPagesRequest.FromString,
                response_serializer=page_pb2.ExportPagesResponse.SerializeToString,
            ),
            "Complete": grpc.unary_unary_rpc_method_handler(
                self.complete,
                request_deserializer=page_pb2.CompleteRequest.FromString,
                response_serializer=page_pb2.CompleteResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def _authorised(self, context: _Context) -> Served:
        """Return what the caller's metadata names, or raise FerryError unless it may have that."""
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get("pageferry-token-bin", b"")
        return self.authorised(
            str(metadata.get("pageferry-migration", "")),
            token if isinstance(token, bytes) else b"",
            peer_names(context) if self._secure else frozenset(),
        )

    def authorised(self, migration_id: str, token: bytes, names: frozenset[str]) -> Served:
        """Return a guest's memory for a caller who has proved these names.

        FerryError: UNKNOWN_MIGRATION, PEER_NOT_ALLOWED, TOKEN_INVALID.
        """
        served = self._served.get(migration_id)
        if served is None:
            raise FerryError(Reason.UNKNOWN_MIGRATION, f"no guest is served here for migration {migration_id!r}")
        if self._secure and served.destination_name.lower() not in names:
            raise FerryError(
                Reason.PEER_NOT_ALLOWED, f"migration {migration_id} goes to {served.destination_name}, not to this peer"
            )
        served.check_token(token)
        return served

    async def get_layout(self, _request: page_pb2.GetLayoutRequest, context: _Context) -> page_pb2.GetLayoutResponse:
        """Tell the layout."""
        return page_pb2.GetLayoutResponse(layout=layout_to_proto(self._authorised(context).layout))

    async def export_pages(
        self, request: page_pb2.ExportPagesRequest, context: _Context
    ) -> page_pb2.ExportPagesResponse:
        """Have the guest's VMM export opaque pages."""
        served = self._authorised(context)
        if not 0 < len(request.pages) <= MAX_FETCH_PAGES:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{len(request.pages)} opaque pages at once: give 1 to 512")
        return page_pb2.ExportPagesResponse(bundles=await served.export(request.pages))

    async def complete(self, request: page_pb2.CompleteRequest, context: _Context) -> page_pb2.CompleteResponse:
        """Let the memory go."""
        self._authorised(context).complete(request.pages)
        return page_pb2.CompleteResponse()

    async def fetch_pages(self, _requests: Any, context: _Context) -> None:
        """The demand lane: read a request, answer it whole, and so on."""
        served = self._authorised(context)
        await context.send_initial_metadata(())
        while (message := await context.read()) is not grpc.aio.EOF:
            try:
                parts = fetch(served, decode_fetch(message))
            except CoreError as error:
                raise misbehaviour(error) from error
            await context.write(b"".join(parts))

    async def push_pages(self, _requests: Any, context: _Context) -> None:
        """The push lane: each request is answered in messages of bounded size, until its credit is spent."""
        served = self._authorised(context)
        await context.send_initial_metadata(())
        while (message := await context.read()) is not grpc.aio.EOF:
            try:
                push = PushAnswer(served, decode_push(message))
                while not push.ended:
                    part = push.next_part()
                    if part is not None:
                        await context.write(b"".join(part))
                    # Writing does not wait while there is room, nor do pages of zeroes: the demand lane has its turn.
                    await asyncio.sleep(0)
            except CoreError as error:
                raise misbehaviour(error) from error


def layout_to_proto(layout: Layout) -> memory_pb2.MemoryLayout:
    """Return a layout as a message."""
    regions = [
        memory_pb2.MemoryRegion(guest_address=region.guest_address, size=region.size, page_size=region.page_size)
        for region in layout.regions
    ]
    return memory_pb2.MemoryLayout(regions=regions)
