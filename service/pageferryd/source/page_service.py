"""PageService: hands out the pages of guests that have left, to the one peer each was sent to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.errors import FerryError, Reason
from pageferry.tls import peer_names
from pageferry.v1 import memory_pb2, page_pb2
from pageferryd.core.errors import CoreError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.requests import MAX_FETCH_PAGES, decode_fetch, decode_push
from pageferryd.core.runs import MAX_RUNS, Run, encode

if TYPE_CHECKING:
    from pageferryd.core.layout import Layout
    from pageferryd.core.requests import Request
    from pageferryd.source.served import Served

SERVICE = "pageferry.v1.PageService"
PUSH_MESSAGE_BYTES = 256 << 10
"""Most bytes of pages in one message of the push lane: what a fault's answer may have to wait behind."""
_FULL_RUNS = MAX_RUNS // 4

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
        migration_id, token = str(metadata.get("pageferry-migration", "")), metadata.get("pageferry-token-bin", b"")
        served = self._served.get(migration_id)
        if served is None:
            raise FerryError(Reason.UNKNOWN_MIGRATION, f"no guest is served here for migration {migration_id!r}")
        if self._secure and served.destination_name.lower() not in peer_names(context):
            raise FerryError(
                Reason.PEER_NOT_ALLOWED, f"migration {migration_id} goes to {served.destination_name}, not to this peer"
            )
        served.check_token(token if isinstance(token, bytes) else b"")
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
                answer = _fetch(served, decode_fetch(message))
            except CoreError as error:
                raise _misbehaviour(error) from error
            await context.write(answer)

    async def push_pages(self, _requests: Any, context: _Context) -> None:
        """The push lane: each request is answered in messages of bounded size, until its credit is spent."""
        served = self._authorised(context)
        await context.send_initial_metadata(())
        while (message := await context.read()) is not grpc.aio.EOF:
            try:
                await _push(served, decode_push(message), context)
            except CoreError as error:
                raise _misbehaviour(error) from error


def _fetch(served: Served, request: Request) -> bytes:
    runs: list[Run] = []
    data: list[bytes | memoryview] = []
    for first, pages in request.runs:
        _collect_whole(served, first, pages, runs, data)
    served.count("demand", runs)
    return encode(runs, data)


def _collect_whole(served: Served, first: int, pages: int, runs: list[Run], data: list[bytes | memoryview]) -> None:
    stop = first + pages
    while first < stop:
        collected = served.collect(first, stop - first, (stop - first) << 12)
        runs += collected.runs
        data += collected.data
        first = collected.next_page


async def _push(served: Served, request: Request, context: _Context) -> None:
    answer = _Answer(request.credit)
    for first, pages in request.runs:
        stop = first + pages
        while first < stop and not answer.spent:
            first = answer.collect(served, first, stop - first)
            if answer.full:
                await context.write(answer.take(served))
            # Writing does not wait while there is room, nor do pages of zeroes: let the demand lane have its turn.
            await asyncio.sleep(0)
    await context.write(answer.take(served, last=True))


class _Answer:
    """Fills messages of the push lane."""

    def __init__(self, credit: int) -> None:
        self._credit = credit
        self._runs: list[Run] = []
        self._data: list[bytes | memoryview] = []
        self._size = 0
        self.spent = False

    @property
    def full(self) -> bool:
        return self._size >= PUSH_MESSAGE_BYTES or len(self._runs) > _FULL_RUNS

    def collect(self, served: Served, first: int, pages: int) -> int:
        """Take pages from `first` on, as many as fit; return the next one."""
        collected = served.collect(first, pages, min(self._credit, PUSH_MESSAGE_BYTES - self._size))
        size = sum(map(len, collected.data))
        # Room for less than a page is no room, and a credit that pays for none is spent.
        self.spent = collected.next_page == first and self._credit < PAGE_SIZE
        self._size = self._size + size if collected.next_page > first else PUSH_MESSAGE_BYTES
        self._credit -= size
        self._runs += collected.runs
        self._data += collected.data
        return collected.next_page

    def take(self, served: Served, *, last: bool = False) -> bytes:
        """Return what was collected as a message, and begin a new one."""
        served.count("push", self._runs)
        message = encode(self._runs, self._data, last=last)
        self._runs, self._data, self._size = [], [], 0
        return message


def _misbehaviour(error: CoreError) -> FerryError:
    return FerryError(Reason(error.reason), f"the destination misbehaves: {error}")


def layout_to_proto(layout: Layout) -> memory_pb2.MemoryLayout:
    """Return a layout as a message."""
    regions = [
        memory_pb2.MemoryRegion(guest_address=region.guest_address, size=region.size, page_size=region.page_size)
        for region in layout.regions
    ]
    return memory_pb2.MemoryLayout(regions=regions)
