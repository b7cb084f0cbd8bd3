"""A TCP proxy that can be cut and stalled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

CHUNK = 64 << 10


class TcpProxy:
    """Forwards to `target` ("HOST:PORT", may be set later) while it is whole; `async with` runs it."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.address = ""
        self.forwarded = 0
        """Bytes forwarded towards who connects: pages, seen from a destination."""
        self.cut_after: int | None = None
        """Cut when so many bytes were forwarded."""
        self._whole = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset every connection, and each new one, until `heal`."""
        self._whole = False
        self._flowing.set()
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Forward nothing more and close nothing, until `heal`: a black hole."""
        self._flowing.clear()

    def heal(self) -> None:
        self._whole = True
        self.cut_after = None
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not self._whole:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            host, _, port = self.target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            self._writers.add(far_writer)
            try:
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer, counted=True))
            finally:
                self._forget(far_writer)
        except OSError:
            pass
        finally:
            self._forget(writer)

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
                if counted:
                    self.forwarded += len(data)
                    if self.cut_after is not None and self.forwarded >= self.cut_after:
                        self.cut()
        writer.transport.abort()
