"""The keeper's log: lines on stderr like the sidecar's (logs.py), without what the sidecar needs to make them."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

_QUIET_SECONDS = 60.0
_LOGGER = "pageferryd.keeper"


class Lines:
    """One line an event, as JSON or for a terminal."""

    def __init__(
        self, log_format: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to `stream` (stderr when None). `log_format`: json or console."""
        self._json = log_format == "json"
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._quiet_until: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def say(self, level: str, event: str, **values: float | str) -> None:
        """Write one line. The keeper outlives whoever reads its lines: one that cannot be written is lost."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
        if self._json:
            line = json.dumps({"event": event, "level": level, "logger": _LOGGER, "timestamp": stamp, **values})
        else:
            said = " ".join(f"{key}={value}" for key, value in values.items())
            line = f"{stamp} [{level}] {event} [{_LOGGER}] {said}"
        with suppress(OSError):
            self._stream.write(line + "\n")
            self._stream.flush()

    def say_seldom(self, event: str, **values: float | str) -> None:
        """Write a warning at most once a minute for each event, with `unsaid`: how many there were in between."""
        now = self._clock()
        if now < self._quiet_until.get(event, now):
            self._unsaid[event] = self._unsaid.get(event, 0) + 1
            return
        self._quiet_until[event] = now + _QUIET_SECONDS
        self.say("warning", event, **values, unsaid=self._unsaid.pop(event, 0))
