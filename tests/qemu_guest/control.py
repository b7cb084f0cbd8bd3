"""The guest's control port: lines over the Unix socket behind its second serial port (workload.c has the protocol)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_RESEND_SECONDS = 2.0
_READY = re.compile(r"ready pages=(\d+) workers=(\d+)")
_VERIFIED = re.compile(r"verified pages=(\d+) bad=(\d+) first_bad=(\S+)")


@dataclass(frozen=True)
class Ready:
    """What the workload has: 4 KiB pages that it fills and checks, and workers, one a vCPU."""

    pages: int
    workers: int


@dataclass(frozen=True)
class Verified:
    """All pages were checked: how many are wrong or ever were, and what was wrong with the first."""

    pages: int
    bad: int
    first_bad: str


@dataclass(frozen=True)
class Stats:
    """The workload's counters; those of gaps since the last `reset`, the others since the start.

    A gap is a first touch of a page that took more than 8 µs of the guest's time, which stands still while the virtual
    machine does. Percentiles are 0 without gaps. `step_ms_max` is the longest access as a whole: touch, check, rewrite.
    """

    reads: int
    writes: int
    bad: int
    gaps: int
    gap_us_p50: float
    gap_us_p99: float
    gap_ms_max: float
    gaps_over_10ms: int
    stall_ms: float
    step_ms_max: float
    uptime: float


class ControlPort:
    """One connection to the port; QEMU serves one at a time and drops what the guest says while there is none."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        # Whatever an earlier connection or host left of a line ends here.
        writer.write(b"\n")

    @classmethod
    async def connect(cls, path: Path) -> Self:
        return cls(*await asyncio.open_unix_connection(path))

    async def started(self, seconds: float) -> Ready:
        """Wait for the line that the workload begins with."""
        async with self._turn, asyncio.timeout(seconds):
            while not (found := _READY.fullmatch(await self._line())):
                pass
        return Ready(int(found[1]), int(found[2]))

    async def command(self, text: str, seconds: float) -> str:
        """Return the guest's answer. The command is sent again until it answers: it is carried out once.

        TimeoutError; ConnectionError when the port is gone; RuntimeError when the guest refuses.
        """
        number = secrets.token_hex(4)
        async with self._turn, asyncio.timeout(seconds):
            while True:
                self._writer.write(f"{number} {text}\n".encode())
                await self._writer.drain()
                try:
                    async with asyncio.timeout(_RESEND_SECONDS):
                        answer = await self._answer(number)
                        break
                except TimeoutError:
                    continue
        if answer.startswith("error:"):
            raise RuntimeError(f"the guest refused {text!r}: {answer}")
        return answer

    async def ready(self, seconds: float) -> Ready:
        """Ask for what the workload said at its start."""
        answer = await self.command("ready", seconds)
        found = _READY.fullmatch(answer)
        if found is None:
            raise RuntimeError(f"the guest answered ready with {answer!r}")
        return Ready(int(found[1]), int(found[2]))

    async def verify(self, seconds: float) -> Verified:
        """Have every page checked."""
        answer = await self.command("verify", seconds)
        found = _VERIFIED.fullmatch(answer)
        if found is None:
            raise RuntimeError(f"the guest answered verify with {answer!r}")
        return Verified(int(found[1]), int(found[2]), found[3])

    async def stats(self, seconds: float) -> Stats:
        """Read the counters."""
        return Stats(**json.loads(await self.command("stats", seconds)))

    async def close(self) -> None:
        """Close the connection; the guest goes on."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _answer(self, number: str) -> str:
        while True:
            found, _, text = (await self._line()).partition(" ")
            if found == number:
                return text

    async def _line(self) -> str:
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the guest's control port was closed")
        return line.decode(errors="replace").rstrip("\r\n")
