"""The benchmark's guest: touches missing pages when told to, and times each touch.

One JSON object a line on stdout, one command a line on stdin: `touch COUNT PAUSE_US` touches up to COUNT random pages
that are missing, with a pause between two, and answers with the microseconds that each took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import struct
import sys
import threading
import time
from pathlib import Path

from pageferry.vmm import GuestMemory, MemoryDescription, PagerLink, Vmm, VmmServer, VmmState

PAGE = 4096
STEP = 256
_PRESENT = 1 << 63


class Toucher(Vmm):
    """Memory whose pages each begin with their number; it runs nothing by itself."""

    def __init__(self, memory: GuestMemory, state: VmmState) -> None:
        self.memory = memory
        self.state = state
        self.link: PagerLink | None = None

    async def describe_memory(self) -> MemoryDescription:
        return MemoryDescription(self.state, [self.memory.region()])

    async def attach_pager(self, socket_path: str) -> None:
        self.link = await asyncio.to_thread(PagerLink.open, socket_path, self.memory)

    async def pause(self) -> None:
        self.state = VmmState.PAUSED

    async def save_state(self) -> bytes:
        return b"toucher"

    async def load_state(self, state: bytes) -> None:
        pass

    async def resume(self) -> None:
        self.state = VmmState.RUNNING

    async def detach_pager(self) -> None:
        if self.link is not None:
            self.link.close()

    async def kill(self) -> None:
        asyncio.get_running_loop().call_later(0.05, os._exit, 0)


def fill(memory: GuestMemory) -> None:
    """Write every page: its number, then noise that no zero detection can skip."""
    noise = random.Random(1).randbytes(PAGE - 8)
    for first in range(0, memory.size // PAGE, STEP):
        memory.write(first * PAGE, b"".join(struct.pack("<Q", page + 1) + noise for page in range(first, first + STEP)))


def touch(memory: GuestMemory, count: int, pause: float, pagemap: int) -> list[float]:
    """Touch missing pages; return the microseconds of each touch."""
    pages = memory.size // PAGE
    chosen = random.Random(os.urandom(8))
    taken: list[float] = []
    for _ in range(20 * count):
        if len(taken) == count:
            break
        page = chosen.randrange(pages)
        entry = os.pread(pagemap, 8, (memory.address // PAGE + page) * 8)
        if int.from_bytes(entry, "little") & _PRESENT:
            continue
        began = time.perf_counter_ns()
        found = memory.read(page * PAGE, 8)
        taken.append((time.perf_counter_ns() - began) / 1000)
        if int.from_bytes(found, "little") != page + 1:
            sys.exit(f"page {page} begins with {found!r}")
        if pause:
            time.sleep(pause)
    return taken


def obey(memory: GuestMemory) -> None:
    """Take commands until stdin ends."""
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "touch":
            taken = touch(memory, int(numbers[0]), int(numbers[1]) / 1e6, pagemap)
            print(json.dumps({"event": "touched", "us": taken}), flush=True)
    os._exit(0)


async def serve(options: argparse.Namespace) -> None:
    memory = GuestMemory(options.memory << 20)
    if not options.incoming:
        fill(memory)
    server = VmmServer()
    state = VmmState.INCOMING if options.incoming else VmmState.RUNNING
    await server.start(Toucher(memory, state), str(options.socket))
    threading.Thread(target=obey, args=(memory,), daemon=True).start()
    print(json.dumps({"event": "ready", "pid": os.getpid()}), flush=True)
    await server.wait_closed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--memory", type=int, required=True, help="MiB")
    parser.add_argument("--incoming", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
