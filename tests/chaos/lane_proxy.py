"""A proxy for lanes over bare sockets that holds their messages at steps, as RpcProxy does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from holds import Holds

from pageferry.v1 import page_pb2

HEAD_BYTES = 4
REFUSAL = 1 << 31
CALLS = {page_pb2.LANE_DEMAND: "FetchPages", page_pb2.LANE_PUSH: "PushPages"}


class LaneProxy:
    """Forwards to `target` ("HOST:PORT", set before the first lane comes); `async with` runs it."""

    def __init__(self) -> None:
        self.holds = Holds()
        self.target = ""
        self.address = ""
        self.refuses = False
        """Let no new lane through: destinations then use gRPC."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.holds.clear()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if not self.refuses:
                await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        try:
            hello = await _frame(reader)
            far_writer.write(hello)
            call = CALLS[page_pb2.LaneHello.FromString(hello[HEAD_BYTES:]).lane]
            # The welcome, which is no answer to anything.
            writer.write(await _frame(far_reader))
            ways = [
                asyncio.create_task(self._carry(reader, far_writer, call, "request")),
                asyncio.create_task(self._carry(far_reader, writer, call, "answer")),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            far_writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: str, phase: str) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while frame := await _frame(reader):
                if not await self.holds.passes(call, phase):
                    return
                writer.write(frame)
                await writer.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(HEAD_BYTES)
    return head + await reader.readexactly(int.from_bytes(head, "little") & ~REFUSAL)
