"""Whose turn it is: guests leave in the order in which they were asked to, so many at once.

A destination that has no room is asked again after a while, for the first of those that wait for it; the others, and
only they, wait behind it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageferryd.control.record import MigrationRecord

_FIRST_WAIT = 0.2
_LONGEST_WAIT = 2.0


@dataclass(eq=False)
class Turn:
    """One migration's place. `number` orders them."""

    record: MigrationRecord
    number: int
    admitted: asyncio.Future[None]
    wait: float = field(default=_FIRST_WAIT)

    @property
    def destination(self) -> str:
        """Where it goes."""
        return self.record.destination_address


@dataclass
class _Full:
    """A destination that had no room: whether it is to be asked again by now, and who does."""

    due: bool = False
    asking: Turn | None = None


class Turns:
    """The queue of one sidecar."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._taken: set[Turn] = set()
        self._waiting: list[Turn] = []
        self._full: dict[str, _Full] = {}
        self._number = 0

    async def take(self, record: MigrationRecord) -> Turn:
        """Wait for a turn; `queue_position` of the record says how long that may be."""
        turn = self._new(record)
        await self._wait(turn)
        return turn

    def occupy(self, record: MigrationRecord) -> Turn:
        """Take a turn at once, for a migration that is under way already."""
        turn = self._new(record)
        self._taken.add(turn)
        return turn

    async def again(self, turn: Turn) -> None:
        """The destination has no room: wait for another turn, in front of all that came later."""
        loop = asyncio.get_running_loop()
        self._taken.discard(turn)
        full = self._full[turn.destination] = _Full()
        loop.call_later(turn.wait, self._ask_again, full)
        turn.wait = min(2 * turn.wait, _LONGEST_WAIT)
        turn.admitted = loop.create_future()
        await self._wait(turn)

    def _ask_again(self, full: _Full) -> None:
        # Said by the timer and not compared with the time: timers may come a moment early, and nothing else would.
        full.due = True
        self._admit()

    def accepted(self, turn: Turn) -> None:
        """The destination has room."""
        if self._full.pop(turn.destination, None) is not None:
            self._admit()

    def give_back(self, turn: Turn) -> None:
        """It is over. Twice does nothing."""
        self._leave(turn)
        self._admit()

    def _new(self, record: MigrationRecord) -> Turn:
        self._number += 1
        return Turn(record, self._number, asyncio.get_running_loop().create_future())

    async def _wait(self, turn: Turn) -> None:
        self._waiting.append(turn)
        self._waiting.sort(key=lambda one: one.number)
        self._admit()
        try:
            await turn.admitted
        except asyncio.CancelledError:
            self._leave(turn)
            if turn in self._waiting:
                self._waiting.remove(turn)
            turn.record.queue_position = 0
            self._admit()
            raise

    def _leave(self, turn: Turn) -> None:
        self._taken.discard(turn)
        full = self._full.get(turn.destination)
        if full is not None and full.asking is turn:
            full.asking = None

    def _admit(self) -> None:
        for turn in list(self._waiting):
            if len(self._taken) >= self._most:
                break
            if self._may_go(turn):
                self._waiting.remove(turn)
                self._taken.add(turn)
                if turn.destination in self._full:
                    self._full[turn.destination].asking = turn
                turn.admitted.set_result(None)
        self._tell_places()

    def _may_go(self, turn: Turn) -> bool:
        full = self._full.get(turn.destination)
        if full is None:
            return True
        first = next(one for one in self._waiting if one.destination == turn.destination)
        return turn is first and full.asking is None and full.due

    def _tell_places(self) -> None:
        for place, turn in enumerate(self._waiting, 1):
            if turn.record.queue_position != place:
                turn.record.queue_position = place
                turn.record.changes.notify()
        for turn in self._taken:
            if turn.record.queue_position:
                turn.record.queue_position = 0
                turn.record.changes.notify()
