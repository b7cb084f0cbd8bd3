"""Processes of ours whose JSON lines are read as they come. Waiting is bounded, and stops no event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

DEADLINE = 20.0

Event = dict[str, Any]


class Child:
    """One process; `stream` ("stdout" or "stderr") is where its events come, one JSON object a line."""

    def __init__(self, command: list[str], stream: str, **popen: Any) -> None:
        self.events: list[Event] = []
        self.other_lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        pipes = {stream: subprocess.PIPE, "stdin": subprocess.PIPE, **popen}
        self.process = subprocess.Popen(command, **pipes)
        self._reader = threading.Thread(target=self._read, args=(getattr(self.process, stream),), daemon=True)
        self._reader.start()

    def _read(self, lines: IO[bytes] | None) -> None:
        for line in lines or ():
            with self._changed:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    self.other_lines.append(line.decode(errors="replace"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def fds(self) -> Counter[str]:
        """How many descriptors of each kind it has open."""
        found = Counter[str]()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            # One that was closed meanwhile is none.
            with contextlib.suppress(FileNotFoundError):
                target = str(link.readlink())
                found[target.partition(":[")[0] if target.startswith(("socket", "pipe")) else target] += 1
        return found

    def wait_event(
        self,
        name: str,
        since: int = 0,
        where: Callable[[Event], bool] = lambda _event: True,
        seconds: float = DEADLINE,
    ) -> Event:
        """Block until an event of that name has come, the first at or behind index `since` that fits."""
        found: list[Event] = []

        def look() -> bool:
            fitting = (one for one in self.events[since:] if one.get("event") == name and where(one))
            found[:] = [one for one, _ in zip(fitting, range(1), strict=False)]
            return bool(found) or self._ended

        with self._changed:
            in_time = self._changed.wait_for(look, seconds)
        last = [*self.events[-5:], *self.other_lines[-5:]]
        assert in_time, f"no {name} within {seconds:g} s; last: {last}"
        assert found, f"the process ended before it said {name}; last: {last}"
        return found[0]

    async def event(self, name: str, since: int = 0, where: Callable[[Event], bool] = lambda _event: True) -> Event:
        return await asyncio.to_thread(self.wait_event, name, since, where)

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, DEADLINE)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End it now, if it has not ended."""
        if self.alive:
            self.process.kill()
        self.process.wait(DEADLINE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and pipe is self.process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        # Whoever inherited the other end may live on: the reader then waits for them, not we.
        self._reader.join(1.0)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None and not self._reader.is_alive():
                pipe.close()


def private_environment() -> dict[str, str]:
    """Return our environment without what would configure a sidecar."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("PAGEFERRY_")}
