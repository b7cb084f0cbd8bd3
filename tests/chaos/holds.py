"""Where a message or a call is held on its way, until the test has done what it wants to do meanwhile."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Hold(Protocol):
    """A step that something will come to."""

    async def reached(self) -> None:
        """Wait until it has come there. AssertionError where it does not, in time."""

    def release(self, *, deliver: bool) -> None:
        """Let it go on, or be lost. Twice does nothing."""


class WireHold:
    """A message that a proxy holds."""

    def __init__(self, call: str, phase: str, nth: int, seconds: float) -> None:
        self._what = f"{call} ({phase} {nth})"
        self._left = nth
        self._seconds = seconds
        self._reached = asyncio.Event()
        self._fate: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def counts(self) -> bool:
        """One more has come; return whether it is the one."""
        self._left -= 1
        return self._left == 0

    async def wait_here(self) -> bool:
        """Stand still; return whether to be delivered."""
        self._reached.set()
        return await asyncio.shield(self._fate)

    async def reached(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._reached.wait()
        except TimeoutError:
            raise AssertionError(f"{self._what} was not seen within {self._seconds:g} s") from None

    def release(self, *, deliver: bool) -> None:
        if not self._fate.done():
            self._fate.set_result(deliver)


class Holds:
    """What the proxies of one wire hold."""

    def __init__(self) -> None:
        self._armed: dict[tuple[str, str], WireHold] = {}
        self._all: list[WireHold] = []

    def arm(self, call: str, phase: str, nth: int, seconds: float) -> WireHold:
        """Hold the `nth` message of a call ("Prepare") from now on; `phase` is "request" or "answer"."""
        hold = WireHold(call, phase, nth, seconds)
        self._armed[call, phase] = hold
        self._all.append(hold)
        return hold

    async def passes(self, call: str, phase: str) -> bool:
        """Tell of a message; return whether it may go on, at once or after it was held."""
        hold = self._armed.get((call, phase))
        if hold is None or not hold.counts():
            return True
        del self._armed[call, phase]
        return await hold.wait_here()

    def clear(self) -> None:
        """Hold nothing more; what is held is lost."""
        self._armed.clear()
        for hold in self._all:
            hold.release(deliver=False)
        self._all.clear()
