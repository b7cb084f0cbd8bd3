"""A stand-in for Firecracker in a process of its own, and a driver for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from firecracker_vmm.launch import COMMAND, environment
from pageferryd.vmm.firecracker.driver import FirecrackerDriver

MIB = 1 << 20
DEADLINE = 20.0


class FirecrackerHouse:
    def __init__(self, process: asyncio.subprocess.Process, path: Path, mib: int) -> None:
        self._process = process
        self._path = path
        self.runtime_dir = path.parent / "run"
        self.pid = process.pid
        self.memory_bytes = mib * MIB
        self.driver = self.another_driver()

    @classmethod
    async def start(cls, path: Path, mib: int, *more: str) -> FirecrackerHouse:
        pipe = asyncio.subprocess.PIPE
        boot = ("--boot", str(mib)) if mib else ()
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--api-sock", str(path), *boot, *more, stdin=pipe, stdout=pipe, env=environment()
        )
        house = cls(process, path, mib)
        await house.event("ready")
        return house

    async def event(self, name: str) -> dict[str, object]:
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while True:
                told: dict[str, object] = json.loads(await self._process.stdout.readline())
                if told["event"] == name:
                    return told

    async def ask(self, command: str, answer: str) -> dict[str, object]:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        return await self.event(answer)

    def another_driver(self) -> FirecrackerDriver:
        return FirecrackerDriver(str(self._path), self.runtime_dir)

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def ended(self) -> None:
        await self._process.communicate()

    async def stop(self) -> None:
        await self.driver.close()
        await self.end()
