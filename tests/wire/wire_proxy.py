"""A proxy for TCP whose wire can fail in each way that wires do, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

CHUNK = 64 << 10
DRIP_SECONDS = 0.1
MOSTLY_PAGES = 1000
"""Bytes; less is what carriers say to each other."""


class Way(Enum):
    """A direction, seen from a destination."""

    UP = "requests"
    DOWN = "pages"


class Wire(Enum):
    """What becomes of bytes."""

    FLOWS = "they arrive"
    HOLDS = "they arrive when the wire is healed, as after TCP has sent them again"
    SWALLOWS = "they are lost, and nobody is told: what is between the hosts has forgotten the connection"
    DRIPS = "they arrive one by one, now and then"


@dataclass(eq=False)
class _Connection:
    """One that goes through; `number` counts from 0, `port` tells which of the targets it is to."""

    number: int
    port: int
    writers: dict[Way, asyncio.StreamWriter]
    wire: dict[Way, Wire]
    late: float = 0.0
    last: bytes = b""
    """What was forwarded last towards the destination, of pages."""


class WireProxy:
    """Forwards from ports of its own to targets; all methods may be called from any thread. `with` runs it."""

    def __init__(self) -> None:
        self.forwarded = 0
        """Bytes that arrived at destinations."""
        self._wire = dict.fromkeys(Way, Wire.FLOWS)
        self._refuses = self._mute = False
        self._trigger: tuple[int, Callable[[], None]] | None = None
        self._connections: list[_Connection] = []
        self._numbers: dict[int, int] = {}
        self._listeners: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._healed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def to(self, target: str) -> str:
        """Return the address of a new port that leads to `target`, both HOST:PORT."""
        return self._call(self._listen(target))

    def when_forwarded(self, size: int, act: Callable[[], None]) -> Future[None]:
        """Do something, with the wire in the middle of a byte stream, once so many bytes have arrived from now on.

        What is returned is done when that is.
        """
        done: Future[None] = Future()

        def act_and_tell() -> None:
            act()
            done.set_result(None)

        self._do(lambda: setattr(self, "_trigger", (self.forwarded + size, act_and_tell)))
        return done

    def becomes(self, wire: Wire, *ways: Way) -> None:
        """Change the wire of all connections, and of each new one; both ways where none is named."""
        self._do(lambda: self._become(wire, ways or tuple(Way)))

    def late(self, number: int, seconds: float) -> None:
        """Have what goes towards the destination arrive so much later, on the connections of this number."""

        def set_it() -> None:
            for one in self._connections:
                if one.number == number:
                    one.late = seconds

        self._do(set_it)

    def cut(self) -> None:
        """Reset all connections, and each new one, until it is healed."""
        self._do(self._cut)

    def hang_up(self, way: Way) -> None:
        """Say the end of the stream in one direction, as a clean half-close does, and let nothing follow."""
        self._do(lambda: [self._end_of(one, way) for one in self._connections])

    def say_again(self, number: int) -> None:
        """Say to the destination once more what was said last on the connections of this number."""
        self._do(lambda: [one.writers[Way.DOWN].write(one.last) for one in self._connections if one.number == number])

    def be_mute(self) -> None:
        """Reset what there is; accept new connections, and never say anything on them."""

        def set_it() -> None:
            self._cut()
            self._refuses, self._mute = False, True

        self._do(set_it)

    def heal(self) -> None:
        """Let new connections through, and what was held; one whose bytes were lost stays as it is."""
        self._do(self._heal)

    # In the thread

    def _call(self, work: Any) -> Any:
        made: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return made.result(10)

    def _do(self, act: Callable[[], object]) -> None:
        async def done() -> None:
            act()

        if threading.current_thread() is self._thread:
            act()
        else:
            self._call(done())

    def _become(self, wire: Wire, ways: tuple[Way, ...]) -> None:
        self._healed.clear()
        for way in ways:
            self._wire[way] = wire
            for one in self._connections:
                one.wire[way] = wire

    def _heal(self) -> None:
        self._refuses = self._mute = False
        self._wire = dict.fromkeys(Way, Wire.FLOWS)
        for one in self._connections:
            one.wire = {way: Wire.FLOWS if wire is Wire.HOLDS else wire for way, wire in one.wire.items()}
        self._healed.set()

    def _cut(self) -> None:
        self._refuses = True
        for one in self._connections:
            for writer in one.writers.values():
                _reset(writer)
        self._healed.set()

    def _end_of(self, one: _Connection, way: Way) -> None:
        one.wire[way] = Wire.SWALLOWS
        with contextlib.suppress(OSError):
            one.writers[way].write_eof()

    async def _listen(self, target: str) -> str:
        port = len(self._listeners)
        server = await asyncio.start_server(lambda *ends: self._accept(target, port, *ends), "127.0.0.1", 0)
        self._listeners.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self._connections:
            for writer in one.writers.values():
                writer.transport.abort()
        await asyncio.sleep(0)
        for listener in self._listeners:
            await listener.wait_closed()

    async def _accept(self, target: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._refuses:
            _reset(writer)
            return
        number = self._numbers[port] = self._numbers.get(port, -1) + 1
        one = _Connection(number, port, {Way.DOWN: writer}, dict(self._wire))
        self._connections.append(one)
        try:
            if self._mute:
                # Until the caller has had enough.
                while await reader.read(CHUNK):
                    pass
                return
            host, _, there = target.rpartition(":")
            far_reader, one.writers[Way.UP] = await asyncio.open_connection(host, int(there))
            await _first_failure(self._pump(one, Way.UP, reader), self._pump(one, Way.DOWN, far_reader))
        except (OSError, asyncio.CancelledError):
            # Nobody is there, or nobody any more: so the caller shall find. Or it is the end.
            pass
        finally:
            self._connections.remove(one)
            for end in one.writers.values():
                end.transport.abort()

    async def _pump(self, one: _Connection, way: Way, reader: asyncio.StreamReader) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1000)

        async def arrive() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if not data:
                    break
                await self._arrive(one, way, data)
            if one.wire[way] is not Wire.SWALLOWS:
                self._end_of(one, way)

        arriving = asyncio.create_task(arrive())
        try:
            while True:
                data = await reader.read(CHUNK)
                await under_way.put((self._loop.time() + (one.late if way is Way.DOWN else 0.0), data))
                if not data:
                    break
            await arriving
        finally:
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)

    async def _arrive(self, one: _Connection, way: Way, data: bytes) -> None:
        while data:
            wire = one.wire[way]
            if wire is Wire.SWALLOWS:
                return
            if wire is Wire.HOLDS:
                await self._healed.wait()
                continue
            part = data[:1] if wire is Wire.DRIPS else data
            data = data[len(part) :]
            one.writers[way].write(part)
            await one.writers[way].drain()
            if way is Way.DOWN:
                one.last = part if len(part) >= MOSTLY_PAGES else one.last
                self._count(len(part))
            if wire is Wire.DRIPS:
                await asyncio.sleep(DRIP_SECONDS)

    def _count(self, size: int) -> None:
        self.forwarded += size
        if self._trigger is not None and self.forwarded >= self._trigger[0]:
            act, self._trigger = self._trigger[1], None
            act()


async def _first_failure(*works: Coroutine[Any, Any, None]) -> None:
    """Work until all are done, or one fails; nothing of the others goes on then."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
