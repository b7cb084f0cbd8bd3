"""Small QEMUs for tests: no guest but the BIOS, which says what it does on its debug port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pageferryd.vmm.qemu.monitor import Monitor

BINARY = "qemu-system-x86_64"
SECONDS = 20.0
TICKS = 0x46C
"""Where the BIOS counts timer interrupts, 18.2 a second (4 bytes)."""

needs_qemu = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed (Debian: qemu-system-x86)"),
]
needs_qemu_and_root = [*needs_qemu, pytest.mark.root]


class Bios:
    """What a BIOS says. It is taken all the time: QEMU stands while its words find no room."""

    def __init__(self, port: socket.socket) -> None:
        port.setblocking(False)
        self._port = port
        self._said = bytearray()
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(port, self._listen)

    def _listen(self) -> None:
        came = self._port.recv(4096)
        if not came:
            self.close()
        self._said += came
        self._more.set()

    async def wait_for(self, words: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            while words not in self._said:
                self._more.clear()
                await self._more.wait()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._port)


class Qemu:
    """A process, a connection to its monitor, and what its BIOS says."""

    def __init__(self, process: asyncio.subprocess.Process, monitor: Monitor, bios: Bios) -> None:
        self.process = process
        self.pid = process.pid
        self.monitor = monitor
        self._bios = bios

    async def bios_ran(self) -> None:
        """Wait until the BIOS has found nothing to boot; it counts timer interrupts from then on."""
        await self._bios.wait_for(b"No bootable device")

    def read(self, address: int, size: int) -> bytes:
        with memory_of(self.pid, os.O_RDONLY) as memory:
            return os.pread(memory, size, address)

    def write(self, address: int, data: bytes) -> None:
        with memory_of(self.pid, os.O_WRONLY) as memory:
            assert os.pwrite(memory, data, address) == len(data)


@contextlib.contextmanager
def memory_of(pid: int, access: int) -> Iterator[int]:
    memory = os.open(f"/proc/{pid}/mem", access | os.O_CLOEXEC)
    try:
        yield memory
    finally:
        os.close(memory)


@asynccontextmanager
async def running_qemu(path: Path, *arguments: str) -> AsyncIterator[Qemu]:
    """Start one with its monitor at `path`; it is killed at the end."""
    ours, theirs = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    with ours:
        with theirs, listener:
            # It listens before QEMU begins, so that nobody has to wait for the socket to appear.
            listener.bind(str(path))
            listener.listen(1)
            base = ["-accel", "tcg", "-nodefaults", "-display", "none"]
            base += ["-chardev", f"socket,id=monitor,fd={listener.fileno()},server=on,wait=off"]
            base += ["-mon", "chardev=monitor,mode=control"]
            base += ["-chardev", f"socket,id=bios,fd={theirs.fileno()}"]
            base += ["-device", "isa-debugcon,iobase=0x402,chardev=bios"]
            process = await asyncio.create_subprocess_exec(
                BINARY, *base, *arguments, pass_fds=(listener.fileno(), theirs.fileno()), stderr=asyncio.subprocess.PIPE
            )
        bios = Bios(ours)
        try:
            monitor = await Monitor.open(path, SECONDS)
            try:
                yield Qemu(process, monitor, bios)
            finally:
                await monitor.close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            _, said = await process.communicate()
            bios.close()
            print(said.decode())  # noqa: T201 - for who reads why a test failed
