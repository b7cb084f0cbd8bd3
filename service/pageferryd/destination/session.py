"""The session: drives one guest's pager between its doors, its lanes and its installer until every page is in."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.errors import CoreError
from pageferryd.core.latency import FaultLatencies
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.destination.arrivals import ArrivalMap
from pageferryd.destination.intake import FaultIntake
from pageferryd.destination.lane_work import LaneWork
from pageferryd.destination.placer import Placer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pageferryd.core.demand import FaultTimes
    from pageferryd.core.layout import Layout
    from pageferryd.core.pacing import PacingOptions
    from pageferryd.core.push_share import PushShare
    from pageferryd.destination.door import FaultDoor, Settled
    from pageferryd.destination.imports import ImportEnd
    from pageferryd.destination.installer import Installer
    from pageferryd.destination.lanes import LaneOpener, Lanes

_log = structlog.get_logger(__name__)

_RETRY_FIRST = 0.0005
_RETRY_LONGEST = 0.5


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Bounds of a session; times in seconds."""

    pager: PagerOptions = field(default_factory=PagerOptions)
    backoff_initial: float = 0.1
    backoff_max: float = 5.0


class Session:
    """One guest's memory on its way in.

    `paused` is called with the reason when the lanes are lost, and with None when they are open again. `lanes` are the
    first ones, opened before the guest depended on them. `note_discard` is told of pages that the guest gives away,
    before they are acted on, and `note_whole` that all are in place, before the source is; what they raise ends the
    session. `share` is what the host's guests push together.
    """

    def __init__(
        self,
        layout: Layout,
        doors: Sequence[FaultDoor],
        installer: Installer,
        opener: LaneOpener,
        options: SessionOptions,
        paused: Callable[[FerryError | None], None] = lambda _error: None,
        lanes: Lanes | None = None,
        note_discard: Callable[[int, int], None] = lambda _first, _pages: None,
        note_whole: Callable[[], None] = lambda: None,
        *,
        share: PushShare | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        # Not the loop's: uvloop's has whole milliseconds.
        self._clock = time.monotonic
        self._doors = doors
        self._installer = installer
        self._opener = opener
        self._options = options
        self._note_whole = note_whole
        self._paused = paused
        self._lanes = lanes
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._reconnect_now = asyncio.Event()
        self._retry_due: asyncio.TimerHandle | None = None
        self._retry_after = _RETRY_FIRST
        member = None if share is None else share.join(options.pager.pacing.weight, self._may_push_again)
        self.pager = Pager(layout, options.pager, self._clock(), member)
        self.arrivals = ArrivalMap(layout.page_count)
        self.latencies = FaultLatencies()
        self.reconnects = 0
        self._listeners = [door for door in doors if door.listens]
        self.placer = Placer(
            self.pager,
            installer,
            self.arrivals,
            self._drain,
            self._faults_ended,
            self._clock,
            self._tell_doors if self._listeners else None,
        )
        self._work = LaneWork(self.pager, self.placer, self._after_install, self.fail)
        self.intake = FaultIntake(
            self.pager, self.placer, self._faults_ended, self._after_faults, self._clock, note_discard
        )

    def open_doors(self) -> None:
        """Begin to serve faults: from now on the guest's memory may be touched, and the source's must not change."""
        for door in self._doors:
            door.open(lambda events, name=door.name: self.intake.take(name, events), self.fail)  # type: ignore[misc]

    def start_push(self) -> None:
        """Begin to push: the guest runs."""
        self._work.push_started = True
        self._work.push_may_be_due()
        self.placer.exports.wake()
        self._check_complete()

    def reconnect_now(self) -> None:
        """Try lost lanes again at once instead of after the backoff."""
        self._reconnect_now.set()

    def report_import(self, first: int, pages: int, end: ImportEnd) -> None:
        """The VMM says how its import of delivered pages ended."""
        with self._work.failures():
            self.placer.desk.report(first, pages, end)
        # What could not be imported is missing again.
        self._work.push_may_be_due()
        self._after_faults()

    def convert(self, first: int, pages: int) -> None:
        """The guest converts pages between shared and private: what is under way of them is of the old kind."""
        self.intake.discard(first, pages, self._clock())
        self._after_faults()

    def set_pacing(self, pacing: PacingOptions) -> None:
        """Put new limits into force."""
        self.pager.set_pacing(pacing, self._clock())
        self._work.push_may_be_due()

    async def run(self) -> None:
        """Serve until every page is installed and the source knows, through any number of losses.

        Whatever goes wrong on the lanes pauses the migration, and they are opened again. FerryError when something at
        this host failed, which no new connection repairs; the guest's memory stays guarded then.
        """
        backoff, settled = self._options.backoff_initial, 0
        while True:
            try:
                if self._lanes is None:
                    self._lanes = await self._opener.open()
                    self.reconnects += 1
                    self._paused(None)
                await self._serve(self._lanes)
                return
            except FerryError as error:
                await self._drop_lanes()
                self._raise_failure()
                if self._finished.done() and error.reason is Reason.UNKNOWN_MIGRATION:
                    # A source that has forgotten the migration has let the memory go; there is nothing left to ask for.
                    _log.warning("source_forgot_migration", detail=error.message)
                    return
                if self.pager.map.settled.count > settled:
                    # That a source takes calls does not make it one that gives pages.
                    settled, backoff = self.pager.map.settled.count, self._options.backoff_initial
                self._paused(error)
                # Its frames hold the lanes' workers, which hold it: gRPC kept their connections until all is collected.
                error.__traceback__ = None
                _log.warning("lanes_lost", reason=error.reason.value, detail=error.message, retry_in=round(backoff, 3))
            await self._wait_to_reconnect(backoff)
            self._raise_failure()
            backoff = min(2 * backoff, self._options.backoff_max)

    def _raise_failure(self) -> None:
        if self._finished.done():
            self._finished.result()

    async def close(self) -> None:
        """Stop. What is missing stays missing, and whoever touches it waits."""
        if not self._finished.cancel() and not self._finished.cancelled():
            # Noted, so that asyncio does not report a failure that nobody waited for.
            self._finished.exception()
        if self._retry_due is not None:
            self._retry_due.cancel()
        for door in self._doors:
            door.close()
        await self._drop_lanes()

    async def _wait_to_reconnect(self, backoff: float) -> None:
        # Spread out, so that the guests of a host do not all come back in one moment.
        wait = backoff * (0.75 + random.random() / 2)  # noqa: S311
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._reconnect_now.wait()
        self._reconnect_now.clear()

    async def _drop_lanes(self) -> None:
        lanes, self._lanes = self._lanes, None
        for lane in Lane:
            self.pager.lane_lost(lane)
        self.placer.exports.lost()
        if lanes is not None:
            await lanes.close()

    async def _serve(self, lanes: Lanes) -> None:
        """Work the lanes until everything is in and acknowledged; FerryError where one is lost."""
        workers = [asyncio.create_task(task) for task in self._work.tasks(lanes)]
        try:
            self._check_complete()
            await asyncio.wait([self._finished, *workers], return_when=asyncio.FIRST_COMPLETED)
            for worker in workers:
                if worker.done():
                    worker.result()
            # Raises what a door or an install has failed with.
            self._finished.result()
            self._note_whole()
            await lanes.complete(self.pager.layout.page_count)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    # What happens between them

    def _may_push_again(self) -> None:
        self._work.push_may_be_due()

    def _tell_doors(self, first: int, pages: int, how: Settled) -> None:
        for door in self._listeners:
            door.settled(first, pages, how)

    def _drain(self) -> None:
        for door in self._doors:
            door.drain()

    def _after_faults(self) -> None:
        self._work.demand_may_be_due()
        self._after_install()

    def _faults_ended(self, ended: list[FaultTimes]) -> None:
        for times in ended:
            self.placer.touched_shared.discard(times.page)
            self.latencies.observe(times.read, times.queued, times.fetched, times.installed, times.total)
        self._work.push_may_be_due(only_if_held=True)

    def _after_install(self) -> None:
        if self.placer.behind:
            self._work.caught_up.clear()
            if self._retry_due is None:
                self._retry_due = self._loop.call_later(self._retry_after, self._retry)
                self._retry_after = min(2 * self._retry_after, _RETRY_LONGEST)
        else:
            self._retry_after = _RETRY_FIRST
            self._work.caught_up.set()
            self._check_complete()

    def _retry(self) -> None:
        self._retry_due = None
        with contextlib.suppress(FerryError, CoreError, OSError), self._work.failures():
            self.placer.retry()
            self._after_install()

    def _check_complete(self) -> None:
        # A guest that has not begun to run may still go back.
        if self._work.push_started and self.pager.complete and not self.placer.behind and not self._finished.done():
            self._finished.set_result(None)

    def fail(self, error: Exception) -> None:
        """Something at this host went wrong that no new connection repairs."""
        if self._finished.done():
            return
        if not isinstance(error, FerryError):
            error = FerryError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
        self._finished.set_exception(error)
        self._reconnect_now.set()
