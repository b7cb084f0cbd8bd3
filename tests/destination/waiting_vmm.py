"""A VMM in a process of its own: hands its memory over, then reads the pages that it is told to.

Run as `waiting_vmm.py SOCKET PAGES`: connects to SOCKET, says "ready", and answers a page number a line with the first
bytes of that page in hex. This file is also the test's end of that.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Self

from pageferry.vmm.handoff import PagerLink
from pageferry.vmm.memory import GuestMemory

PAGE = 4096


class WaitingVmm:
    """The child; `pid` is its process id."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, socket_path: Path, pages: int) -> Self:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, __file__, str(socket_path), str(pages)]
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        # It waits to be told: who listens has to know its pid first.
        return cls(process)

    async def hand_over(self) -> None:
        """Have it connect and hand over."""
        await self.tell("go")
        assert await self.answer() == "ready"

    async def tell(self, line: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        await self.process.stdin.drain()

    async def answer(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(10):
            return (await self.process.stdout.readline()).decode().strip()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


def main() -> None:
    path, pages = sys.argv[1], int(sys.argv[2])
    memory = GuestMemory(pages * PAGE)
    sys.stdin.readline()
    link = PagerLink.open(path, memory)
    print("ready", flush=True)
    for line in sys.stdin:
        print(memory.read(int(line) * PAGE, 8).hex(), flush=True)
    link.close()


if __name__ == "__main__":
    main()
