"""A process guest that says when it runs and when it stands still, and can be held at any call of its sidecar.

A process of its own, run by path. Lines on the file descriptor `--gate`: "hold CALL before", "hold CALL after" (when it
is done, and not answered), "go". Events beside those of every guest: `held` (`call`, `phase`), `runs` and `stands`
(`at`: nanoseconds of CLOCK_MONOTONIC, `steps`), each written before the guest runs and after it stands.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pageferry.guests.control import EventWriter, run_control
from pageferry.guests.process.guest import ProcessGuest
from pageferry.guests.process.plan import Order, Plan
from pageferry.vmm import Backing, GuestMemory, VmmServer
from pageferry.vmm.regions import MemoryDescription

MIB = 1 << 20
HOLES = 4


class Gate:
    """Holds one call at a time, as the lines on a pipe say."""

    def __init__(self, fd: int, events: EventWriter) -> None:
        self._fd = fd
        self._events = events
        self._armed: set[tuple[str, str]] = set()
        self._go = asyncio.Event()
        self._rest = b""
        asyncio.get_running_loop().add_reader(fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, 4096)
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._go.set()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            match line.decode().split():
                case ["hold", call, phase]:
                    self._armed.add((call, phase))
                    self._go.clear()
                case ["go"]:
                    self._armed.clear()
                    self._go.set()

    async def passes(self, call: str, phase: str) -> None:
        if (call, phase) in self._armed:
            self._armed.discard((call, phase))
            await self._events.write("held", call=call, phase=phase)
            await self._go.wait()

    @asynccontextmanager
    async def around(self, call: str) -> AsyncIterator[None]:
        await self.passes(call, "before")
        yield
        await self.passes(call, "after")


class GatedGuest(ProcessGuest):
    """See the module."""

    gate: Gate
    events: EventWriter

    async def tell(self, event: str) -> None:
        await self.events.write(event, at=time.monotonic_ns(), steps=self.status().steps)

    async def attach_pager(self, socket_path: str) -> None:
        async with self.gate.around("AttachPager"):
            await super().attach_pager(socket_path)

    async def pause(self) -> None:
        async with self.gate.around("Pause"):
            await super().pause()
            await self.tell("stands")

    async def save_state(self) -> bytes:
        async with self.gate.around("SaveState"):
            return await super().save_state()

    async def load_state(self, state: bytes) -> None:
        async with self.gate.around("LoadState"):
            await super().load_state(state)

    async def resume(self) -> None:
        async with self.gate.around("Resume"):
            await self.tell("runs")
            await super().resume()

    async def detach_pager(self) -> None:
        async with self.gate.around("DetachPager"):
            await super().detach_pager()

    async def kill(self) -> None:
        async with self.gate.around("Kill"):
            await super().kill()

    async def describe_memory(self) -> MemoryDescription:
        async with self.gate.around("DescribeMemory"):
            return await super().describe_memory()


async def main() -> None:
    options = _options()
    memory = GuestMemory(options.memory * MIB, options.backing)
    pages = memory.size // 4096
    working = max(1, round(pages * options.working_set))
    plan = Plan(seed=options.seed, pages=pages, working=working, holes=HOLES, order=Order.RANDOM)
    guest = GatedGuest(memory) if options.incoming else GatedGuest.started(memory, plan)
    assert isinstance(guest, GatedGuest)
    guest.events = EventWriter()
    guest.gate = Gate(options.gate, guest.events)
    if not options.incoming:
        await guest.tell("runs")
    server = VmmServer()
    await server.start(guest, options.socket)
    await run_control(guest, server)
    os._exit(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--gate", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True, help="MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--incoming", action="store_true")
    parser.add_argument("--backing", type=Backing, default=Backing.ANONYMOUS)
    parser.add_argument("--working-set", type=float, default=1.0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)
    asyncio.run(main())
