"""The work on one connection: requests out, answers in. `_ask` and `_take_answers` are on the way of every fault."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.errors import CoreError
from pageferryd.core.pager import Lane
from pageferryd.core.runs import decode
from pageferryd.destination.lanes import PromptLanes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    from pageferryd.core.pager import Pager
    from pageferryd.destination.lanes import Lanes
    from pageferryd.destination.placer import Placer


class LaneWork:
    """What the lanes' tasks share, whichever connection they work on.

    `placed` is called after every install, `failed` with what fails at this host; the lanes' own failures are raised.
    """

    def __init__(
        self, pager: Pager, placer: Placer, placed: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        self._pager = pager
        self._placer = placer
        self._placed = placed
        self._failed = failed
        self._clock = time.monotonic
        self._demand_due = asyncio.Event()
        self._push_due = asyncio.Event()
        self._push_held = False
        self._prompt: PromptLanes | None = None
        self._checksums = False
        self.push_started = False
        """Whether the guest runs, so that its memory may be pushed."""
        self.caught_up = asyncio.Event()
        """Set while nothing that arrived waits to be put in place: no push is taken before."""
        self.caught_up.set()

    def tasks(self, lanes: Lanes) -> list[Coroutine[Any, Any, None]]:
        """Return what has to run, all at once, for as long as the connection lives."""
        self._demand_due.set()
        self._push_due.set()
        self._checksums = lanes.checksums
        if isinstance(lanes, PromptLanes):
            demand = [self._attend(lanes)]
        else:
            demand = [self._ask(lanes), self._take_answers(lanes)]
        return [
            *demand,
            self._ask_for_push(lanes),
            self._take_push(lanes),
            self._watch(),
            self._placer.damage.watch(self._missing_again),
            *self._placer.exports.workers(lanes, lambda: self.push_started),
        ]

    def demand_may_be_due(self) -> None:
        """Faults came, or room for their requests."""
        if not self._pager.demand_due:
            return
        if self._prompt is None:
            self._demand_due.set()
            return
        # What the lane's loss is for its reader to say.
        with contextlib.suppress(FerryError):
            self._ask_now(self._prompt)

    def push_may_be_due(self, *, only_if_held: bool = False) -> None:
        """Something happened that lets push go on; `only_if_held`: that only ends a hold."""
        if self._push_held or not only_if_held:
            self._push_due.set()

    def _missing_again(self) -> None:
        """Pages came damaged."""
        self.demand_may_be_due()
        self.push_may_be_due()

    async def _attend(self, lanes: PromptLanes) -> None:
        """Work a demand lane that needs no task for it."""
        try:
            self._ask_now(lanes)
            self._prompt = lanes
            await lanes.deliver_fetched(self._take_answer)
        finally:
            self._prompt = None

    def _ask_now(self, lanes: PromptLanes) -> None:
        while (runs := self._pager.next_fetch(self._clock())) is not None:
            lanes.fetch_now(runs)

    async def _ask(self, lanes: Lanes) -> None:
        work, pager, clock = self._demand_due, self._pager, self._clock
        while True:
            runs = pager.next_fetch(clock())
            if runs is None:
                await work.wait()
                work.clear()
            else:
                await lanes.fetch(runs)

    async def _take_answers(self, lanes: Lanes) -> None:
        while True:
            self._take_answer(await lanes.fetched())

    def _take_answer(self, message: bytes) -> None:
        try:
            batch = decode(message, checksums=self._checksums)
            self._pager.demand_arrived(batch.runs, self._clock())
        except CoreError as error:
            raise _misbehaviour(error) from error
        try:
            self._placer.place(batch, Lane.DEMAND)
        except (FerryError, CoreError, OSError) as error:
            self._failed(error)
            raise FerryError(Reason.LANE_LOST, f"an answer could not be put in place: {error}") from error
        self.demand_may_be_due()
        self._placed()

    async def _ask_for_push(self, lanes: Lanes) -> None:
        while True:
            self._push_due.clear()
            now = self._clock()
            request = self._pager.next_push(now) if self.push_started else None
            if request is not None:
                await lanes.push(request.runs, request.credit)
                continue
            held_until = self._pager.push_wake_at(now) if self.push_started else None
            self._push_held = held_until is not None
            timer = (
                asyncio.get_running_loop().call_later(held_until - now, self._push_due.set)
                if held_until is not None
                else None
            )
            await self._push_due.wait()
            if timer is not None:
                timer.cancel()

    async def _take_push(self, lanes: Lanes) -> None:
        while True:
            await self.caught_up.wait()
            message = await lanes.pushed()
            try:
                batch = decode(message, checksums=self._checksums)
                self._pager.push_arrived(batch.runs, self._clock(), last=batch.last)
            except CoreError as error:
                raise _misbehaviour(error) from error
            self._push_due.set()
            with self.failures():
                for _ in self._placer.slices(batch, Lane.PUSH):
                    await asyncio.sleep(0)
                    if self._placer.desk.full:
                        self._placed()
                        await self.caught_up.wait()
            self._placed()

    async def _watch(self) -> None:
        """Notice a source that is connected and says nothing."""
        while True:
            await asyncio.sleep(self._pager.options.silence / 4)
            lane = self._pager.silent_lane(self._clock())
            # A push lane that this end does not read while it is behind says nothing of the source.
            if lane is not None and not (lane is Lane.PUSH and self._placer.behind):
                raise FerryError(
                    Reason.LANE_SILENT,
                    f"the source has not answered on the {lane.value} lane for {self._pager.options.silence:g} s",
                )

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Tell what fails at this host from what lanes bring, which may bear the same reasons."""
        try:
            yield
        except (FerryError, CoreError, OSError) as error:
            self._failed(error)
            raise


def _misbehaviour(error: CoreError) -> FerryError:
    """Return what the core refuses of the source's messages, as a reason to drop the lanes."""
    return FerryError(Reason(error.reason), f"the source misbehaves: {error}")
