"""The two QEMUs of one measured migration, and when each of them stopped, ran and ended its part."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

sys.path.append(str(Path(__file__).resolve().parents[1]))

from qemu_guest.guest import Machine, QemuGuest

SECONDS = 180.0


class Watch:
    """The events of one QEMU, over a monitor that nothing else uses, with the host's time at which each happened."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._ended = False
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, path: Path) -> Self:
        watch = cls(*await asyncio.open_unix_connection(path))
        watch._writer.write(b'{"execute": "qmp_capabilities"}\n')
        await watch._writer.drain()
        return watch

    async def first(self, name: str, **data: str) -> float:
        """Wait for the first event of that name and data; return its time, in seconds of the host's wall clock.

        RuntimeError when QEMU ended or its migration failed before.
        """
        async with asyncio.timeout(SECONDS):
            while True:
                for event in self._events:
                    if event["event"] == name and data.items() <= event.get("data", {}).items():
                        return float(event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6)
                    if event.get("data") == {"status": "failed"}:
                        raise RuntimeError("QEMU says that the migration failed")
                if self._ended:
                    raise RuntimeError(f"QEMU ended before its event {name}")
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        """Close the monitor; QEMU goes on."""
        self._listening.cancel()
        await asyncio.wait([self._listening])
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._events.append(message)
                    self._news.set()
        finally:
            self._ended = True
            self._news.set()


@dataclass(frozen=True)
class Moved:
    """What the means of moving says itself: ms from the destination's start to its last page, and bytes moved."""

    total_ms: float
    bytes: int


@dataclass(frozen=True)
class Figures:
    """What one migration cost; docs/benchmarks.md says what each figure means."""

    downtime_ms: float
    gap_us_p50: float
    gap_us_p99: float
    gap_ms_max: float
    gaps_over_10ms: int
    stall_ms: float
    total_ms: float
    bytes: int
    bad_pages: int


class Ends:
    """A guest that works, a QEMU of the same kind that waits for it, and a watch over each. `async with` ends all."""

    def __init__(self, machine: Machine, binary: str, directory: Path) -> None:
        self._sockets = {end: directory / f"{end}-events" for end in ("source", "destination")}
        self.source, self.destination = (
            QemuGuest(machine, binary=binary, incoming=incoming, extra=("-qmp", f"unix:{path},server=on,wait=off"))
            for incoming, path in zip((False, True), self._sockets.values(), strict=True)
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.destination)
            await stack.enter_async_context(self.source)
            self.source_events = await self._watch(stack, "source")
            self.destination_events = await self._watch(stack, "destination")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def begin(self) -> None:
        """Begin the guest's figures of gaps anew: right before the migration."""
        await self.source.command("reset")

    async def version(self) -> str:
        """Return QEMU's release."""
        version = (await self.source.monitor.execute("query-version"))["qemu"]
        return f"{version['major']}.{version['minor']}.{version['micro']}"

    async def _watch(self, stack: AsyncExitStack, end: str) -> Watch:
        watch = await Watch.connect(self._sockets[end])
        stack.push_async_callback(watch.close)
        return watch


async def measured(ends: Ends, move: Callable[[Ends], Awaitable[Moved]]) -> Figures:
    """Move the guest, and read what it saw once its last page is in; then have it check every page.

    `move` prepares, calls `ends.begin`, and returns when the last page is in.
    """
    moved = await move(ends)
    guest = ends.destination
    await guest.attach()
    stats = await guest.stats()
    stopped, runs = await ends.source_events.first("STOP"), await ends.destination_events.first("RESUME")
    verified = await guest.verify(SECONDS)
    assert ends.source.ready is not None
    if verified.pages != ends.source.ready.pages:
        raise RuntimeError(f"the guest checked {verified.pages} pages of {ends.source.ready.pages}")
    return Figures(
        downtime_ms=round((runs - stopped) * 1e3, 3),
        gap_us_p50=stats.gap_us_p50,
        gap_us_p99=stats.gap_us_p99,
        gap_ms_max=stats.gap_ms_max,
        gaps_over_10ms=stats.gaps_over_10ms,
        stall_ms=stats.stall_ms,
        total_ms=round(moved.total_ms, 3),
        bytes=moved.bytes,
        bad_pages=verified.bad,
    )
