"""A chaos guest as tests drive it: held at calls, and asked when it ran."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from child import Child
from moving_guest import Guest
from patience import Patient

PROGRAM = str(Path(__file__).with_name("chaos_guest.py"))


@dataclass(frozen=True)
class Span:
    """A time in which a guest ran, in nanoseconds of CLOCK_MONOTONIC; `end` is None while it may run still."""

    begin: int
    end: int | None


class HeldGuest(Patient, Guest):
    """A guest of `memory` MiB. Options are those of chaos_guest.py."""

    def __init__(self, socket_path: Path, *options: str, memory: int = 8) -> None:
        self.socket_path = str(socket_path)
        reader, self._gate = os.pipe()
        command = [sys.executable, PROGRAM, "--socket", self.socket_path, "--memory", str(memory)]
        try:
            Child.__init__(self, [*command, "--gate", str(reader), *options], "stdout", pass_fds=(reader,))
        finally:
            os.close(reader)
        try:
            self.wait_event("ready")
        except BaseException:
            self.close()
            raise

    def hold(self, call: str, phase: str, seconds: float = 10.0) -> CallHold:
        """Hold the next such call, "before" it is done or "after"."""
        return CallHold(self, call, phase, seconds)

    def gate(self, line: str) -> None:
        # One that is gone needs no word.
        with contextlib.suppress(OSError):
            os.write(self._gate, line.encode() + b"\n")

    def close(self) -> None:
        super().close()
        gate, self._gate = self._gate, -1
        if gate >= 0:
            os.close(gate)

    @property
    def spans(self) -> list[Span]:
        """When it ran."""
        found: list[Span] = []
        for event in list(self.events):
            if event.get("event") == "runs":
                found.append(Span(event["at"], None))
            elif event.get("event") == "stands" and found:
                found[-1] = Span(found[-1].begin, event["at"])
        return found

    async def state(self) -> str:
        """Return the state's word as it is now, or "gone"."""
        try:
            return str((await self.status())["state"]) if self.alive else "gone"
        except (AssertionError, OSError):
            # It ended while it was asked.
            if self.alive:
                raise
            return "gone"

    async def kill_now(self) -> None:
        self.process.kill()
        await self.exit_code()


class CallHold:
    """A call that a guest holds."""

    def __init__(self, guest: HeldGuest, call: str, phase: str, seconds: float) -> None:
        self._guest = guest
        self._call = call
        self._phase = phase
        self._seconds = seconds
        self._since = len(guest.events)
        guest.gate(f"hold {call} {phase}")

    async def reached(self) -> None:
        def fits(event: dict[str, object]) -> bool:
            return event.get("call") == self._call and event.get("phase") == self._phase

        await asyncio.to_thread(self._guest.wait_event, "held", self._since, fits, self._seconds)

    def release(self, *, deliver: bool) -> None:
        """Let the call go on; a call cannot be lost, so `deliver` makes no difference."""
        self._guest.gate("go")
