"""The wire: two lanes, each ordered in itself and not with the other; connections break, or fall silent."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from pageferryd.core.pager import Lane

from .clock import Clock
from .source import Message, Source


class Wire:
    """`deliver` gets what comes from the source, `lost` is told of a broken connection."""

    def __init__(self, rng: random.Random, clock: Clock, source: Source, delays: dict[Lane, float]) -> None:
        self._rng = rng
        self._clock = clock
        self._source = source
        self._delays = delays
        self._connection = 0
        self._up = False
        self._silent: set[Lane] = set()
        self._latest: dict[tuple[Lane, bool], float] = {}
        self.obstacles = 0
        """How many things keep the hosts apart; at most the network and a source that is down."""
        self.source_dies: Callable[[], bool] = lambda: False
        """Asked when the source has noted that every page arrived, and not said so yet."""
        self.deliver: Callable[[Lane, Message], None]
        self.lost: Callable[[], None]
        self.completed: Callable[[], None]

    def connect(self) -> bool:
        """Open both lanes; what an older connection had in flight is gone."""
        self.drop()
        self._up = not self.obstacles
        return self._up

    def drop(self) -> None:
        self._connection += 1
        self._up = False
        self._silent.clear()
        self._latest.clear()

    def cut(self) -> None:
        """Lose what is in flight, and say so a little later."""
        self.drop()
        self._clock.note("cut")
        self._clock.after(self._rng.random() * 0.01, self._tell, self._connection)

    def _tell(self, connection: int) -> None:
        if connection == self._connection:
            self.lost()

    def silence(self, lane: Lane) -> None:
        """From now on the lane swallows everything, and says nothing of it."""
        self._clock.note(f"silence on {lane.value}")
        self._silent.add(lane)

    def fetch(self, runs: tuple[tuple[int, int], ...]) -> None:
        self._send(Lane.DEMAND, True, self._at_source_fetch, runs)

    def push(self, runs: tuple[tuple[int, int], ...], credit: int) -> None:
        self._send(Lane.PUSH, True, self._at_source_push, runs, credit)

    def complete(self, pages: int) -> None:
        self._send(Lane.DEMAND, True, self._at_source_complete, pages)

    def _at_source_fetch(self, runs: tuple[tuple[int, int], ...]) -> None:
        # What was asked for by the way is of no use to anyone after Complete.
        if not self._source.released:
            self._send(Lane.DEMAND, False, self._at_destination, Lane.DEMAND, self._source.fetch(runs))

    def _at_source_push(self, runs: tuple[tuple[int, int], ...], credit: int) -> None:
        if self._source.released:
            return
        for message in self._source.push(runs, credit):
            self._send(Lane.PUSH, False, self._at_destination, Lane.PUSH, message)

    def _at_source_complete(self, pages: int) -> None:
        self._source.complete(pages)
        if not self.source_dies():
            self._send(Lane.DEMAND, False, self._acknowledge)

    def _at_destination(self, lane: Lane, message: Message) -> None:
        self.deliver(lane, message)

    def _acknowledge(self) -> None:
        self.completed()

    def _send(self, lane: Lane, to_source: bool, call: Callable[..., None], *args: Any) -> None:
        if not self._up:
            return
        due = self._clock.now + self._rng.random() * self._delays[lane]
        due = max(due, self._latest.get((lane, to_source), 0.0))
        self._latest[lane, to_source] = due
        self._clock.at(due, self._arrive, self._connection, lane, call, args)

    def _arrive(self, connection: int, lane: Lane, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if connection == self._connection and lane not in self._silent:
            call(*args)
