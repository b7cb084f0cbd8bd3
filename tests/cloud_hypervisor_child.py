"""The stand-in for Cloud Hypervisor as a process of its own, and its guest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEADLINE = 10.0
PROGRAM = Path(__file__).with_name("cloud_hypervisor_vmm")

Event = dict[str, Any]


class CloudHypervisor:
    """One VMM with its API at `socket_path`."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self.process = process
        self.socket_path = str(path)
        self.events: list[Event] = []
        self._changed = asyncio.Condition()
        self._ended = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, path: Path, *options: str) -> CloudHypervisor:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(PROGRAM), "--api", str(path), *options, stdin=pipe, stdout=pipe
        )
        started = cls(process, path)
        try:
            await started.event("ready")
        except BaseException:
            await started.close()
            raise
        return started

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def wrongs(self) -> list[Event]:
        """What the guest found wrong while it ran."""
        return [event for event in self.events if event.get("event") == "error" or event.get("errors")]

    async def event(self, name: str, since: int = 0, where: Callable[[Event], bool] = lambda _event: True) -> Event:
        """Wait for the first event of that name, at or behind index `since`, that fits."""
        found: list[Event] = []

        def look() -> bool:
            found[:] = [one for one in self.events[since:] if one["event"] == name and where(one)]
            return bool(found) or self._ended

        try:
            async with asyncio.timeout(DEADLINE), self._changed:
                await self._changed.wait_for(look)
        except TimeoutError:
            raise AssertionError(f"no {name} within {DEADLINE:g} s; last: {self.events[-3:]}") from None
        assert found, f"the VMM ended before it said {name}; last: {self.events[-3:]}"
        return found[0]

    async def ask(self, command: str, answer: str) -> Event:
        since = len(self.events)
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        return await self.event(answer, since)

    async def status(self) -> Event:
        return await self.ask("status", "status")

    async def steps(self) -> int:
        steps: int = (await self.status())["steps"]
        return steps

    async def runs_on(self) -> None:
        """Wait until the guest has done more than it had when this was called."""
        status = await self.status()
        assert status["state"] == "running", status
        await self.event("progress", len(self.events), lambda event: event["steps"] > status["steps"])

    async def is_intact(self) -> None:
        """Have every byte of the guest checked."""
        found = await self.ask("verify", "verified")
        assert found["bad"] == 0, found["first_bad"]
        assert found["pages"] > 0
        assert self.wrongs == []

    async def exit_code(self) -> int:
        async with asyncio.timeout(DEADLINE):
            return await self.process.wait()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def close(self) -> None:
        """End it, if it has not ended."""
        await self.kill()
        await self._reading
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.process.stdin.close()
                await self.process.stdin.wait_closed()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            async with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        async with self._changed:
            self._ended = True
            self._changed.notify_all()
