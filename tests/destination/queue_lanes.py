"""Lanes over queues to the real page service over real memory, with whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import grpc

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2, page_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.core.pager import Lane
from pageferryd.core.requests import decode_fetch, decode_push, encode_request
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Served

TOKEN = b"t" * 32
Spoil = Callable[[Lane, bytes], bytes | None]
"""Makes another answer of an answer, or none."""


class _Context:
    """What the page service sees of a call: requests come from one queue, answers go to another."""

    def __init__(self, source: QueueSource, lane: Lane | None) -> None:
        self.requests: asyncio.Queue[bytes] = asyncio.Queue()
        self.answers: asyncio.Queue[bytes | FerryError] = asyncio.Queue()
        self._source = source
        self._lane = lane

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("pageferry-migration", "m"), ("pageferry-token-bin", TOKEN))

    async def send_initial_metadata(self, _metadata: object) -> None:
        pass

    async def read(self) -> Any:
        return await self.requests.get()

    async def write(self, message: bytes) -> None:
        assert self._lane is not None
        answer = self._source.spoil(self._lane, message)
        if answer is not None:
            self.answers.put_nowait(answer)
        await self._source.flowing.wait()


class _Stream:
    """One lane: the page service's handler in a task of its own."""

    def __init__(self, source: QueueSource, lane: Lane) -> None:
        self._context = _Context(source, lane)
        method = source.pages.fetch_pages if lane is Lane.DEMAND else source.pages.push_pages
        self._task = asyncio.create_task(self._serve(method))

    async def _serve(self, method: Any) -> None:
        try:
            await method(None, self._context)
        except FerryError as error:
            self.lose(error)

    def ask(self, message: bytes) -> None:
        self._context.requests.put_nowait(message)

    async def answer(self) -> bytes:
        message = await self._context.answers.get()
        if isinstance(message, FerryError):
            self.lose(message)
            raise message
        return message

    def lose(self, error: FerryError) -> None:
        self._context.answers.put_nowait(error)

    async def close(self) -> None:
        self._context.requests.put_nowait(grpc.aio.EOF)  # type: ignore[arg-type]
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class QueueLanes:
    """One connection."""

    def __init__(self, source: QueueSource) -> None:
        self.checksums = source.served.checksums
        self._source = source
        self._streams = {lane: _Stream(source, lane) for lane in Lane}
        self.lost: FerryError | None = None
        self.fetches: list[tuple[tuple[int, int], ...]] = []
        self.pushes: list[tuple[tuple[int, int], ...]] = []

    async def fetch(self, runs: Any) -> None:
        self._check()
        self.fetches.append(tuple(decode_fetch(encode_request(runs)).runs))
        self._streams[Lane.DEMAND].ask(encode_request(runs))

    async def fetched(self) -> bytes:
        return await self._streams[Lane.DEMAND].answer()

    async def push(self, runs: Any, credit: int) -> None:
        self._check()
        self.pushes.append(tuple(decode_push(encode_request(runs, credit)).runs))
        self._streams[Lane.PUSH].ask(encode_request(runs, credit))

    async def pushed(self) -> bytes:
        return await self._streams[Lane.PUSH].answer()

    async def complete(self, pages: int) -> None:
        self._check()
        if self._source.refuse_completion is not None:
            raise self._source.refuse_completion
        request = page_pb2.CompleteRequest(pages=pages)
        await self._source.pages.complete(request, _Context(self._source, None))  # type: ignore[arg-type]

    async def close(self) -> None:
        for stream in self._streams.values():
            await stream.close()

    def cut(self, reason: Reason = Reason.LANE_LOST) -> None:
        self.lost = FerryError(reason, "the test cut the lanes")
        for stream in self._streams.values():
            stream.lose(self.lost)

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost


class QueueSource:
    """A source whose memory is `layout`, filled by `fill`, and every connection to it."""

    def __init__(self, layout: Layout, fill: Callable[[int], bytes | None], *, checksums: bool = False) -> None:
        self.layout = layout
        self._memories = [GuestMemory(region.size) for region in layout.regions]
        for memory, start in zip(self._memories, layout.starts, strict=True):
            for number in range(memory.size // PAGE_SIZE):
                body = fill(start + number)
                if body is not None:
                    memory.write(number * PAGE_SIZE, body)
        locations = [
            memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=memory.address))
            for memory in self._memories
        ]
        source = SourceMemory.open(layout, locations, os.getpid())
        self.completions = 0
        self.served = Served("m", TOKEN, "", source, layout, self._complete, checksums=checksums)
        self.served.open()
        self.pages = PageService(secure=False)
        self.pages.offer(self.served)
        self.spoil: Spoil = lambda _lane, message: message
        self.refuse_completion: FerryError | None = None
        self.unreachable: FerryError | None = None
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.connections: list[QueueLanes] = []
        self.attempted = asyncio.Event()

    async def open(self) -> QueueLanes:
        self.attempted.set()
        if self.unreachable is not None:
            raise self.unreachable
        self.connections.append(QueueLanes(self))
        return self.connections[-1]

    def close(self) -> None:
        self.pages.withdraw("m")
        for memory in self._memories:
            memory.close()

    def _complete(self) -> None:
        self.completions += 1
