"""What the machine can do without pageferry: a bare socket's round trip and throughput, and a local userfault.

The two processes of each floor run on different cores, as two hosts, or a vCPU and a sidecar, do. Left to the scheduler
they at times share one, where a round trip takes a tenth of the time, and the floor would change from run to run.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection

import uvloop

from pageferry.vmm import GuestMemory
from pageferryd.linux.buffers import address_of
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.userfaultfd import Fault, Userfaultfd

PAGE = 4096
REQUEST = 24
"""Bytes of a request: about what a gRPC message that asks for a page has."""
CHUNK = 256 << 10


class _Pages(asyncio.Protocol):
    """Answers each request with a page."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.pending = 0

    def data_received(self, data: bytes) -> None:
        self.pending += len(data)
        while self.pending >= REQUEST:
            self.pending -= REQUEST
            self.transport.write(bytes(PAGE))  # type: ignore[attr-defined]


async def _serve_pages(ready: Connection) -> None:
    server = await asyncio.get_running_loop().create_server(_Pages, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _serve_stream(ready: Connection) -> None:
    async def pour(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunk = bytes(CHUNK)
        try:
            while True:
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(pour, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class _Core:
    """Keeps this process on the first or the last core while it is measured."""

    def __init__(self, *, last: bool) -> None:
        self._all = os.sched_getaffinity(0)
        self._one = max(self._all) if last else min(self._all)

    def __enter__(self) -> None:
        os.sched_setaffinity(0, {self._one})

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self._all)


def _run(serve: str, ready: Connection) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    uvloop.run({"pages": _serve_pages, "stream": _serve_stream}[serve](ready))


class _Server:
    """A server in a process of its own."""

    def __init__(self, serve: str) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, theirs), daemon=True)
        self._process.start()
        self.port: int = ours.recv()

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


class _Asker(asyncio.Protocol):
    """Asks for a page, and again as soon as it is there."""

    def __init__(self, rounds: int) -> None:
        self.taken: list[float] = []
        self.done = asyncio.get_running_loop().create_future()
        self._rounds = rounds
        self._got = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        self._began = time.perf_counter_ns()
        self.transport.write(bytes(REQUEST))  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got < PAGE:
            return
        self._got = 0
        self.taken.append((time.perf_counter_ns() - self._began) / 1000)
        if len(self.taken) == self._rounds:
            self.done.set_result(None)
        else:
            self._ask()


async def _round_trips(port: int, rounds: int) -> list[float]:
    loop = asyncio.get_running_loop()
    transport, asker = await loop.create_connection(lambda: _Asker(rounds), "127.0.0.1", port)
    await asker.done
    transport.close()
    return asker.taken


def socket_round_trips(rounds: int) -> list[float]:
    """Return the microseconds of 4 KiB round trips between two processes, asyncio (uvloop) on both sides."""
    server = _Server("pages")
    try:
        with _Core(last=False):
            return uvloop.run(_round_trips(server.port, rounds))
    finally:
        server.end()


async def _swallow(port: int, size: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    got, began = 0, time.perf_counter()
    while got < size:
        got += len(await reader.read(1 << 20))
    taken = time.perf_counter() - began
    writer.close()
    return got / taken / 1e6


def socket_throughput(size: int) -> float:
    """Return MB/s of a stream between two processes, asyncio (uvloop) on both sides, 256 KiB a write."""
    server = _Server("stream")
    try:
        with _Core(last=False):
            return uvloop.run(_swallow(server.port, size))
    finally:
        server.end()


def _touch_all(memory: GuestMemory, order: list[int], report: Connection) -> None:
    taken = []
    for page in order:
        began = time.perf_counter_ns()
        memory.read(page * PAGE, 8)
        taken.append((time.perf_counter_ns() - began) / 1000)
    report.send(taken)


async def _answer(uffd: Userfaultfd, page: bytes, ended: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def readable() -> None:
        for event in uffd.read_events():
            if isinstance(event, Fault):
                uffd.copy(event.address & ~(PAGE - 1), address_of(page), PAGE)

    loop.add_reader(uffd.fileno(), readable)
    await ended.wait()
    loop.remove_reader(uffd.fileno())


def local_userfaults(count: int) -> list[float]:
    """Return the microseconds of faults that another process's event loop (uvloop) answers from memory at hand."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_fault_process, args=(count, theirs), daemon=True)
    process.start()
    fd = ours.recv()
    uffd = Userfaultfd.adopt(_take_fd(process.pid or 0, fd))
    ours.send("go")

    async def serve() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), ended.set)
        await _answer(uffd, os.urandom(PAGE), ended)
        loop.remove_reader(ours.fileno())

    try:
        with _Core(last=False):
            uvloop.run(serve())
        taken: list[float] = ours.recv()
        return taken
    finally:
        process.terminate()
        process.join()
        uffd.close()


def _take_fd(pid: int, fd: int) -> int:
    with PidFd(pid) as process:
        return process.get_fd(fd)


def _fault_process(count: int, report: Connection) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    memory = GuestMemory(64 << 20)
    report.send(memory.open_userfault())
    report.recv()
    order = list(range(memory.size // PAGE))
    random.Random(2).shuffle(order)
    _touch_all(memory, order[:count], report)
    report.recv()
