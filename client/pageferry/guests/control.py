"""How a demonstration guest is watched and asked: one JSON object a line on stdout, one command word a line on stdin.

Events: `ready` (with `pid`, once the VmmService is served), `progress` (a few times a second: `steps`, `errors`,
`state`, `longest_stall_ms`), `error` (`message`), `verified` (`pages`, `bad`, `first_bad`), `status` (as progress),
`bye`. Commands: `verify` checks every byte of memory while the guest stands still, `status`, `quit`. The end of stdin
is a `quit` too, unless detached; SIGTERM and SIGINT always are.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pageferry.errors import FerryError
from pageferry.vmm import VmmServer

PROGRESS_SECONDS = 0.2
WRITE_SECONDS = 5.0
LONGEST_COMMAND = 4096
LISTED_FINDINGS = 8
"""How many findings `first_bad` lists at most."""


@dataclass(frozen=True)
class GuestStatus:
    """A look at a guest: steps done, errors found so far, and the state's word ("running", "paused", "incoming").

    `longest_stall_ms` is how long one of its memory accesses took at most, where the guest measures it.
    """

    steps: int
    errors: int
    state: str
    longest_stall_ms: float = 0.0


@dataclass(frozen=True)
class Verification:
    """The outcome of a check of every byte: pages looked at, how many were bad, and the first few of these in words."""

    pages: int
    bad: int
    first_bad: list[str] = field(default_factory=list)


class GuestControl(Protocol):
    """What a guest offers to `run_control`."""

    def status(self) -> GuestStatus:
        """Tell how far the guest is, without waiting for it."""

    async def verify(self) -> Verification:
        """Pause the guest, check every byte of its memory, let it go on. FerryError where that cannot be done."""

    def take_findings(self) -> list[str]:
        """Return the errors that the running guest found since the last call, in words; at most a few."""


async def run_control(
    guest: GuestControl, server: VmmServer, *, detach: bool = False, stdin: int = 0, stdout: int = 1
) -> None:
    """Announce the guest that `server` already serves, obey commands until it has to end, and stop `server`.

    `stdin` and `stdout` are file descriptors. The caller exits the process afterwards.
    """
    out = EventWriter(stdout)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await out.write("ready", pid=os.getpid())
    tasks = [
        asyncio.create_task(ended.wait()),
        asyncio.create_task(_report_progress(guest, out)),
        asyncio.create_task(_Commands(guest, out, ended).obey(stdin, detach=detach)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop()
    await out.write("bye")


class EventWriter:
    """Writes events to a pipe, a file or a terminal, and never lets a slow or absent reader stop the guest."""

    def __init__(self, fd: int = 1) -> None:
        self._fd = fd
        self._open = True

    async def write(self, event: str, **fields: Any) -> None:
        """Write one event; it is lost when the reader is gone or takes nothing for WRITE_SECONDS."""
        if not self._writable():
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await _ready(self._fd, writing=True)
            except TimeoutError:
                print(f"event {event} was not taken by the reader of stdout: dropped", file=sys.stderr)
                return
        self._put(event, fields)

    def write_or_drop(self, event: str, **fields: Any) -> None:
        """Write one event if the reader keeps up: for those that a newer one replaces."""
        if self._writable():
            self._put(event, fields)

    def _writable(self) -> bool:
        return bool(select.select([], [self._fd], [], 0)[1])

    def _put(self, event: str, fields: dict[str, Any]) -> None:
        if not self._open:
            return
        # A pipe that polls writable takes PIPE_BUF = 4096 bytes at once (pipe(7)); no event is longer.
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        try:
            os.write(self._fd, line)
        except BrokenPipeError:
            # The reader is gone. A detached guest goes on; another one reads the end of its stdin too, and ends.
            self._open = False


async def _report_progress(guest: GuestControl, out: EventWriter) -> None:
    while True:
        for message in guest.take_findings():
            await out.write("error", message=_short(message, 512))
        out.write_or_drop("progress", **asdict(guest.status()))
        await asyncio.sleep(PROGRESS_SECONDS)


class _Commands:
    """Obeys stdin. A verification goes on beside it, so that a guest that waits for pages can still be ended."""

    def __init__(self, guest: GuestControl, out: EventWriter, ended: asyncio.Event) -> None:
        self._guest = guest
        self._out = out
        self._ended = ended
        self._verification: asyncio.Task[None] | None = None

    async def obey(self, stdin: int, *, detach: bool) -> None:
        try:
            async for command in _commands(stdin):
                if command == "quit":
                    return
                await self._obey_one(command)
            if detach:
                await self._ended.wait()
        finally:
            if self._verification is not None:
                self._verification.cancel()

    async def _obey_one(self, command: str) -> None:
        match command:
            case "status":
                await self._out.write("status", **asdict(self._guest.status()))
            case "verify" if self._verification is None or self._verification.done():
                self._verification = asyncio.create_task(self._verify())
            case "verify":
                await self._out.write("error", message="a verification is under way already")
            case _:
                text = _short(repr(command), 64)
                await self._out.write("error", message=f"unknown command {text}: verify, status or quit")

    async def _verify(self) -> None:
        try:
            found = await self._guest.verify()
        except FerryError as error:
            await self._out.write("error", message=_short(f"cannot verify: {error}", 512))
            return
        first_bad = [_short(text, 200) for text in found.first_bad[:LISTED_FINDINGS]]
        await self._out.write("verified", pages=found.pages, bad=found.bad, first_bad=first_bad)


def _short(text: str, limit: int) -> str:
    """Return at most `limit` ASCII characters of `text`, so that an event never outgrows PIPE_BUF."""
    return text.encode("ascii", "replace").decode()[:limit]


async def _commands(fd: int) -> AsyncIterator[str]:
    rest = b""
    while True:
        await _ready(fd, writing=False)
        chunk = os.read(fd, LONGEST_COMMAND)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk:
            lines.append(rest)
        for line in lines:
            word = line.decode(errors="replace").strip()
            if word:
                yield word
        if not chunk:
            return
        rest = rest[-LONGEST_COMMAND:]


async def _ready(fd: int, *, writing: bool) -> None:
    """Wait until `fd` can be read or written without blocking."""
    loop = asyncio.get_running_loop()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    event = asyncio.Event()
    try:
        add(fd, event.set)
    except PermissionError:
        # epoll refuses files and /dev/null, which never block.
        return
    try:
        await event.wait()
    finally:
        remove(fd)
