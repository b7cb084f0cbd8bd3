"""A guest as a process of its own: runs and can be moved, or waits for one to come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from child import Child, Event

HOSTILE = str(Path(__file__).with_name("hostile_vmm.py"))


class Guest(Child):
    """A guest of `kind` "process" or "kvm", or of what `hostile_vmm.py` can do when `hostile` names it."""

    def __init__(
        self,
        socket_path: Path,
        *options: str,
        kind: str = "process",
        memory: str = "16M",
        hostile: str | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.socket_path = str(socket_path)
        what = ["-m", f"pageferry.guests.{kind}"] if hostile is None else [HOSTILE, "--behave", hostile]
        command = [*prefix, sys.executable, *what, "--socket", self.socket_path, "--memory", memory, *options]
        super().__init__(command, "stdout")
        try:
            self.wait_event("ready")
        except BaseException:
            self.close()
            raise

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    async def ask(self, command: str, answer: str) -> Event:
        since = len(self.events)
        self.say(command)
        return await self.event(answer, since)

    async def status(self) -> Event:
        return await self.ask("status", "status")

    async def steps(self) -> int:
        steps: int = (await self.status())["steps"]
        return steps

    async def runs_on(self) -> None:
        """Wait until it has done more than it had when this was called."""
        status = await self.status()
        assert status["state"] == "running", status
        await self.event("progress", len(self.events), lambda event: event["steps"] > status["steps"])

    async def is_intact(self) -> None:
        """Have every byte checked."""
        found = await self.ask("verify", "verified")
        assert found["bad"] == 0, found["first_bad"]
        assert found["pages"] > 0
        assert self.wrongs == []

    @property
    def wrongs(self) -> list[Any]:
        """What the guest found wrong while it ran."""
        return [event for event in self.events if event.get("event") == "error" or event.get("errors")]
