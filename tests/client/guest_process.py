"""Run a demonstration guest as a real process and talk to it: its events, its commands, its VmmService."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Self

from pageferry.channel import open_channel
from pageferry.v1 import vmm_pb2_grpc

DEADLINE = 30.0


class GuestProcess:
    """One guest; `async with` ends it."""

    def __init__(self, socket_path: Path, *options: str, module: str = "pageferry.guests.process") -> None:
        self.socket_path = str(socket_path)
        self._command = [sys.executable, "-m", module, "--socket", self.socket_path, *options]

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
        self.channel = open_channel(f"unix:{self.socket_path}", None)
        self.vmm = vmm_pb2_grpc.VmmServiceStub(self.channel)
        assert (await self.event("ready"))["pid"] == self.process.pid
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        if self.process.returncode is None:
            self.process.kill()
        self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), DEADLINE)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def say(self, command: str) -> None:
        self.process.stdin.write(command.encode() + b"\n")
        await self.process.stdin.drain()

    async def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Return the next event of that name, with these fields; events before it are passed over."""
        async with asyncio.timeout(DEADLINE):
            while True:
                line = await self.process.stdout.readline()
                assert line, f"the guest ended before it said {name}"
                event = json.loads(line)
                if event["event"] == name and fields.items() <= event.items():
                    return event

    async def verify(self) -> dict[str, Any]:
        await self.say("verify")
        return await self.event("verified")

    async def status(self) -> dict[str, Any]:
        await self.say("status")
        return await self.event("status")

    async def steps_beyond(self, steps: int) -> int:
        """Wait until the guest has done more than `steps` steps."""
        async with asyncio.timeout(DEADLINE):
            while True:
                done = (await self.event("progress"))["steps"]
                if done > steps:
                    return done

    async def in_a_fault(self) -> None:
        """Wait until the guest, which has just begun to run, waits for its first page."""
        async with asyncio.timeout(DEADLINE):
            while not (await self.event("progress"))["longest_stall_ms"]:
                pass

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), DEADLINE)
