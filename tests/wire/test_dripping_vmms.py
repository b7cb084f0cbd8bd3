"""A VMM that says a byte now and then and never finishes: each wait for it is bounded as a whole, not by the byte."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pageferry.abi import cloud_hypervisor as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm.handoff import HandoffRegion, encode_table
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.handoff import HandoffListener
from pageferryd.vmm.cloud_hypervisor import protocol
from pageferryd.vmm.cloud_hypervisor.protocol import PeerConnection
from pageferryd.vmm.http_api import UnixHttp
from pageferryd.vmm.qemu import blocks
from pageferryd.vmm.qemu.monitor import Monitor

PATIENCE = 0.3
BETWEEN = 0.05
DEADLINE = 20.0
GREETING = b'{"QMP":{"version":{"qemu":{"major":9,"minor":0,"micro":0},"package":""},"capabilities":[]}}\r\n'
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d") / "s"


@asynccontextmanager
async def serving(path: Path, serve: Serve) -> AsyncIterator[None]:
    tasks: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            await serve(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async with await asyncio.start_unix_server(handle, path):
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Say the bytes one by one, and begin anew at the end."""
    while True:
        for number in data:
            writer.write(bytes([number]))
            await writer.drain()
            await asyncio.sleep(BETWEEN)


async def reason_of(awaitable: Awaitable[object]) -> Reason:
    with pytest.raises(FerryError) as refused:
        await asyncio.wait_for(awaitable, DEADLINE)
    return refused.value.reason


async def test_a_greeting_of_qemu_that_drips_is_not_waited_for(path: Path) -> None:
    async with serving(path, lambda _reader, writer: drip(writer, GREETING)):
        assert await reason_of(Monitor.open(path, PATIENCE)) is Reason.VMM_UNREACHABLE


async def test_an_answer_of_qemu_that_drips_or_is_behind_events_without_end_is_not_waited_for(path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readuntil(b"qmp_capabilities")
        writer.write(b'{"return":{}}\r\n')
        while True:
            writer.write(b'{"event":"STOP","timestamp":{"seconds":1,"microseconds":2}}\r\n')
            await writer.drain()
            await asyncio.sleep(BETWEEN)

    async with serving(path, serve):
        monitor = await Monitor.open(path, DEADLINE)
        assert await reason_of(monitor.execute("query-status", None, PATIENCE)) is Reason.VMM_UNREACHABLE
        await asyncio.wait_for(monitor.close(), DEADLINE)


async def test_a_qemu_that_answers_each_of_many_questions_late_is_not_asked_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_LOOK_SECONDS", PATIENCE)
    tree = "".join(f"  {at:016x}-{at + 0xFFF:016x} (prio 0, ram): pc.ram\n" for at in range(0, 4000 << 12, 1 << 12))
    texts = {
        "info ramblock": "Block Name PSize Offset Used Total\npc.ram 4 KiB 0x0 0x1000 0x1000\n",
        "info mtree -f": ' AS "memory", root: system\n' + tree,
    }

    class Late:
        path = "/run/qemu.sock"

        async def hmp(self, line: str) -> str:
            await asyncio.sleep(BETWEEN)
            return texts.get(line, "nothing there")

    assert await reason_of(blocks.find_blocks(Late(), os.getpid())) is Reason.VMM_UNREACHABLE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
    ids=["answer", "headers without end", "continue without end"],
)
async def test_an_answer_of_an_api_that_drips_is_not_waited_for(path: Path, said: bytes) -> None:
    async with serving(path, lambda _reader, writer: drip(writer, said)):
        assert await reason_of(UnixHttp(str(path)).call("GET", "/", seconds=PATIENCE)) is Reason.VMM_UNREACHABLE


async def test_a_body_of_an_api_that_drips_is_not_waited_for(path: Path) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await drip(writer, b"1\r\n \r\n")

    async with serving(path, serve):
        assert await reason_of(UnixHttp(str(path)).call("GET", "/", seconds=PATIENCE)) is Reason.VMM_UNREACHABLE


@pytest.fixture
def ends() -> Iterator[tuple[PeerConnection, asyncio.StreamWriter | socket.socket]]:
    here, vmm = socket.socketpair()
    vmm.setblocking(False)
    connection = PeerConnection(here, "the VMM")
    yield connection, vmm
    connection.close()
    vmm.close()


async def drip_into(vmm: socket.socket, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    for number in data:
        await loop.sock_sendall(vmm, bytes([number]))
        await asyncio.sleep(BETWEEN)


@pytest.mark.parametrize("step", ["request", "payload", "slot", "answer"])
async def test_a_step_of_a_migration_that_drips_is_not_waited_for(
    ends: tuple[PeerConnection, socket.socket], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(protocol, "STEP_SECONDS", PATIENCE)
    connection, vmm = ends
    request = protocol.Request(abi.Command.CONFIG, abi.NO_HEADERS, 1000)
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "request": connection.receive_request,
        "payload": lambda: connection.receive_payload(request, 1000),
        "slot": lambda: connection.receive_slot(protocol.Request(abi.Command.MEMORY_FD, abi.NO_HEADERS, 4)),
        "answer": lambda: connection.ask(abi.Command.START),
    }
    dripping = asyncio.create_task(drip_into(vmm, bytes(500)))
    assert await reason_of(steps[step]()) is Reason.VMM_FAILED
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)


async def test_a_hand_off_that_drips_is_not_waited_for(path: Path) -> None:
    layout = Layout([Region(0, 4 * PAGE_SIZE)])
    table = encode_table([HandoffRegion(0x7F0000000000, 4 * PAGE_SIZE, 0)])
    listener = HandoffListener(path, layout, os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as vmm:
        vmm.setblocking(False)
        vmm.connect(str(path))
        dripping = asyncio.create_task(drip_into(vmm, table))
        assert await reason_of(listener.receive(PATIENCE)) is Reason.HANDOFF_TIMEOUT
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    listener.close()
