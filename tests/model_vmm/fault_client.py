"""The VMM's end of FaultService, with the real servicer behind queues in place of gRPC."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from pageferry.v1 import fault_pb2
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.destination.fault_service import TOKEN_BYTES, TOKEN_KEY, FaultServicer

SECRET = b"s" * TOKEN_BYTES
SHARINGS = {False: fault_pb2.SHARING_SHARED, True: fault_pb2.SHARING_PRIVATE}

Response = fault_pb2.ResolveFaultsResponse
Take = Callable[[Response, int], Awaitable[None]]
"""Takes a response, and the number of the stream that brought it."""


class _Context:
    """What the servicer sees of a call."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.responses: asyncio.Queue[Response] = asyncio.Queue()

    def invocation_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((TOKEN_KEY, SECRET),)

    async def send_initial_metadata(self, _metadata: object) -> None:
        pass

    async def read(self) -> Any:
        return await self.requests.get()

    async def write(self, response: Response) -> None:
        self.responses.put_nowait(response)


class FaultClient:
    """Forwards faults on one stream at a time; what a broken one has not answered is asked for again."""

    def __init__(self, servicer: FaultServicer, layout: Layout, take: Take) -> None:
        self._servicer = servicer
        self._layout = layout
        self._take = take
        self._tokens = itertools.count(1)
        self._unanswered: dict[int, tuple[fault_pb2.ResolveFaultsRequest, asyncio.Future[Response | None]]] = {}
        self._context = _Context()
        self._tasks: list[asyncio.Task[None]] = []
        self.streams = 0
        self.over = False

    def connect(self) -> None:
        """Open a stream."""
        self.streams += 1
        self._context = _Context()
        self._tasks = [
            asyncio.create_task(self._servicer.ResolveFaults(None, self._context)),  # type: ignore[arg-type]
            asyncio.create_task(self._listen(self._context, self.streams)),
        ]
        for request, _ in self._unanswered.values():
            self._context.requests.put_nowait(request)

    async def reconnect(self, *, in_order: bool) -> None:
        """Break the stream and open another, before or after the pager has noticed."""
        if self.over:
            return
        context, tasks = self._context, self._tasks
        if not in_order:
            self.connect()
        await _end(context, tasks)
        if in_order and not self.over:
            self.connect()

    async def fault(self, first: int, pages: int, *, private: bool) -> Response | None:
        """Forward a fault and wait; None where the pager is needed no longer."""
        if self.over:
            return None
        request = fault_pb2.ResolveFaultsRequest(
            token=next(self._tokens),
            guest_address=self._address(first),
            size=pages * PAGE_SIZE,
            access=fault_pb2.ACCESS_WRITE,
            sharing=SHARINGS[private],
        )
        future: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        self._unanswered[request.token] = (request, future)
        self._context.requests.put_nowait(request)
        return await future

    async def convert(self, first: int, pages: int, *, private: bool) -> None:
        request = fault_pb2.ConvertRangeRequest(
            guest_address=self._address(first), size=pages * PAGE_SIZE, sharing=SHARINGS[private]
        )
        await self._servicer.ConvertRange(request, self._context)  # type: ignore[arg-type]

    async def report(self, page: int, result: fault_pb2.ImportResult.ValueType) -> None:
        if self.over:
            return
        imported = fault_pb2.Import(guest_address=self._address(page), size=PAGE_SIZE, result=result)
        await self._servicer.ReportImports(
            fault_pb2.ReportImportsRequest(imports=[imported]),
            self._context,  # type: ignore[arg-type]
        )

    async def stop(self) -> None:
        """The migration is over: who waits looks for itself."""
        self.over = True
        await _end(self._context, self._tasks)
        for _, future in self._unanswered.values():
            if not future.done():
                future.set_result(None)
        self._unanswered.clear()

    async def _listen(self, context: _Context, stream: int) -> None:
        while True:
            response = await context.responses.get()
            await self._take(response, stream)
            if response.token:
                _, future = self._unanswered.pop(response.token, (None, None))
                if future is not None and not future.done():
                    future.set_result(response)

    def failure(self) -> BaseException | None:
        """Return what a task of the stream has ended with."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                return task.exception()
        return None

    def _address(self, page: int) -> int:
        piece = next(self._layout.pieces(page, 1))
        return self._layout.regions[piece.region].guest_address + piece.first * PAGE_SIZE


async def _end(context: _Context, tasks: list[asyncio.Task[None]]) -> None:
    context.requests.put_nowait(grpc.aio.EOF)
    serving, listening = tasks
    await serving
    listening.cancel()
    ended = await asyncio.gather(listening, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
