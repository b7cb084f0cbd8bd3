"""As much of QMP as the harness needs for itself (QEMU's docs/interop/qmp-spec): commands one by one, and events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from pathlib import Path
from typing import Any, Self

_MOST_EVENTS = 1024
_LONGEST_LINE = 1 << 20


class QmpError(Exception):
    """QEMU refused a command."""


class Monitor:
    """One QMP connection, for one task at a time, as a socket is for one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect and negotiate; when this returns, QEMU is in its main loop. OSError while nobody listens."""
        monitor = cls(*await asyncio.open_unix_connection(path, limit=_LONGEST_LINE))
        try:
            await monitor._message()
            await monitor.execute("qmp_capabilities")
        except BaseException:
            await monitor.close()
            raise
        return monitor

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Return what the command returns; an underscore in an argument's name stands for QMP's hyphen."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._writer.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        await self._writer.drain()
        while True:
            message = await self._message()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    async def event(self, name: str) -> dict[str, Any]:
        """Return the data of the next event of that name; events before it are passed over."""
        while True:
            message = self._events.popleft() if self._events else await self._message()
            if message.get("event") == name:
                data: dict[str, Any] = message.get("data", {})
                return data

    async def close(self) -> None:
        """Close the connection; QEMU goes on."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _message(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("QEMU closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message
