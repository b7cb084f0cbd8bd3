"""A proxy for stream sockets, TCP or Unix, that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Self

from pageferry import address as addresses

CHUNK = 64 << 10


class StreamProxy:
    """Forwards to `target`, an address as the sidecar's, from one of the same kind; `async with` runs it."""

    def __init__(self, target: str, directory: Path) -> None:
        self.address = ""
        self._target = target
        self._directory = directory
        self._whole = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        if addresses.is_unix(self._target):
            path = self._directory / "proxy.sock"
            self._server = await asyncio.start_unix_server(self._accept, path)
            self.address = f"unix:{path}"
        else:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.address = addresses.join(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        for writer in self._writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def cut(self) -> None:
        """Reset every connection, and each new one, until `heal`."""
        self._whole = False
        for writer in self._writers:
            writer.transport.abort()

    def heal(self) -> None:
        self._whole = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            far_reader, far_writer = await self._connect()
            self._writers.add(far_writer)
            if not self._whole:
                self.cut()
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except OSError:
            # Nobody is there: so the caller shall find.
            pass
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if addresses.is_unix(self._target):
            return await asyncio.open_unix_connection(self._target.removeprefix(addresses.UNIX_PREFIX))
        return await asyncio.open_connection(*addresses.split(self._target))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
