"""A waiting VMM on the way to a session that fills its memory: looked at, readied, and received from."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2
from pageferryd.control.arrival import Arrival
from pageferryd.control.arrivals_journal import Arriving
from pageferryd.control.fitting import refuse_unfit
from pageferryd.control.keeping import Kept, file_ids, find_in
from pageferryd.control.landing import Landing, Waiting
from pageferryd.control.limits import session_options
from pageferryd.control.view import layout_of
from pageferryd.core.errors import LayoutError
from pageferryd.destination.grpc_lanes import GrpcLaneOpener
from pageferryd.destination.page_calls import Source
from pageferryd.destination.socket_lanes import SocketLaneOpener
from pageferryd.linux.proc import started_at
from pageferryd.source.page_service import layout_to_proto

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pageferry.v1 import memory_pb2
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.core.layout import Layout
    from pageferryd.destination.lanes import LaneOpener


class Approach:
    """One VMM's. `paused` is the session's: told when lanes are lost, and open again."""

    def __init__(self, guest: Guest, around: Surroundings, paused: Callable[[FerryError | None], None]) -> None:
        self._guest = guest
        self._around = around
        self._paused = paused
        self._request = incoming_pb2.PrepareRequest()
        self._landing: Landing | None = None
        self.arrival: Arrival | None = None
        self._pid = 0
        self._started = 0
        self._noted = False
        self._kept: Kept | None = None
        self.touched = False
        """Whether the VMM knows of this migration, and can serve no other."""

    async def ready(self, request: incoming_pb2.PrepareRequest, refuse_ended: Callable[[], None]) -> None:
        """Look whether the guest fits, and ready the VMM as far as the guest's memory is known.

        `refuse_ended` raises when the migration has ended while the VMM was asked.
        """
        self._request = request
        description = await self._guest.driver.describe()
        self._pid, self._started = description.pid, started_at(description.pid)
        theirs = _layout_in(request.layout) if request.HasField("layout") else None
        refuse_unfit(self._guest, description, request, theirs)
        refuse_ended()
        layout = description.layout or theirs
        if theirs is not None and layout is not None:
            await self._land(layout)

    async def ready_late(self, layout: memory_pb2.MemoryLayout) -> None:
        """Ready the VMM now that the guest's memory is known, unless it was before."""
        if self._landing is None and self.arrival is None:
            await self._land(_layout_in(layout))

    async def load(self, state: bytes, serve: Callable[[Arrival], None]) -> None:
        """Load the state; `serve` begins to serve faults, which the VMM needs meanwhile."""
        loading = self._guest.driver.load_state(state)
        if self._landing is not None:
            await self._arrive(loading, serve)
            return
        try:
            serve(self.arrived())
        except BaseException:
            loading.close()
            raise
        await loading

    async def retake(self, arriving: Arriving) -> Arrival:
        """Take the memory of a VMM again that an earlier sidecar was filling. FerryError: VMM_GONE, HANDOFF_*."""
        self._request, self._pid, self._started = arriving.prepare, arriving.pid, arriving.started
        self.touched = True
        if not arriving.alive:
            raise FerryError(Reason.VMM_GONE, f"the VMM (process {arriving.pid}) ended while nobody looked")
        layout = _layout_in(arriving.layout)
        self._kept = Kept(self._around.store, self._name)
        landing = await Landing.open(
            self._waiting(layout),
            self._name,
            self._around.settings,
            self._opener(layout),
            fault_token=arriving.fault_token,
            refusals=self._around.refusals,
        )
        self._landing = landing
        await self._arrive(_retake(landing, arriving, self._kept))
        arrival = self.arrived()
        await arrival.look_what_is_there()
        for first, pages in self._around.journal.arrivals.discards(self._name):
            arrival.session.intake.restore(first, pages)
        if arriving.whole:
            # Every page was in place: what is missing now was given away since, and its source may be gone.
            arrival.give_away_missing()
        arrival.wake_all()
        return arrival

    def arrived(self) -> Arrival:
        """Return the memory on its way in. FerryError(ILLEGAL_STATE) before there is any."""
        if self.arrival is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self._name} has no memory to fill")
        return self.arrival

    async def note(self) -> None:
        """Note, once there is memory, what a later sidecar must know to go on. FerryError(NO_SPACE)."""
        if self.arrival is None or self._noted:
            return
        layout = layout_to_proto(self.arrival.session.pager.layout)
        descriptors = self.arrival.kept
        self._kept = Kept(self._around.store, self._name)
        await self._kept.keep(descriptors)
        self._around.journal.arrivals.ready(
            Arriving(
                self._guest.address,
                self._pid,
                self._started,
                self._request,
                layout,
                self.arrival.guarded_addresses,
                file_ids(descriptors),
                self.arrival.fault_token,
            )
        )
        self._noted = True

    async def drop_kept(self) -> None:
        """No later sidecar needs the memory any more."""
        if self._kept is not None:
            await self._kept.drop()

    async def abandon(self) -> None:
        """Let the memory go, or the place where it would have come down: the VMM has ended, or was never to run."""
        landing, self._landing = self._landing, None
        if landing is not None:
            await landing.abandon()
        if self.arrival is not None:
            await self.arrival.abandon()
        await self.drop_kept()

    @property
    def source_address(self) -> str:
        """Where the source's sidecar is reached."""
        return self._request.page_address

    @property
    def _name(self) -> str:
        return self._request.migration_id

    def _waiting(self, layout: Layout) -> Waiting:
        return Waiting(self._guest.driver, layout, self._pid)

    def _opener(self, layout: Layout) -> LaneOpener:
        request, settings = self._request, self._around.settings
        lanes = request.lane_address if settings.lane_sockets else ""
        source = Source(
            request.migration_id,
            request.page_address,
            request.source_name,
            request.token,
            layout,
            lanes,
            checksums=request.policy.checksums,
        )
        over_grpc = GrpcLaneOpener(source, self._around.tls, settings.limits.lane_silence_timeout)
        if not lanes:
            return over_grpc
        return SocketLaneOpener(source, self._around.tls, settings.limits.lane_silence_timeout, over_grpc)

    async def _land(self, layout: Layout) -> None:
        """Open the lanes and ready the VMM; have its memory handed over, unless that comes with the state."""
        driver, opener = self._guest.driver, self._opener(layout)
        self._landing = await Landing.open(
            self._waiting(layout),
            self._name,
            self._around.settings,
            opener,
            await opener.open(),
            refusals=self._around.refusals,
        )
        self.touched = True
        if driver.memory_comes_with_state:
            await driver.attach_pager(self._landing)
        else:
            await self._arrive(driver.attach_pager(self._landing))

    async def _arrive(
        self, asking: Coroutine[Any, Any, None], arrived: Callable[[Arrival], None] | None = None
    ) -> None:
        """Receive the memory from a VMM while it is asked for it; `arrived` is called before the asking is over."""
        asked = asyncio.create_task(asking)
        try:
            landing, self._landing = self._landing, None
            if landing is None:
                raise FerryError(Reason.ILLEGAL_STATE, f"migration {self._name} has nowhere to land")
            options = session_options(self._request.limits, self._around.settings.limits)
            journal = self._around.journal.arrivals
            self.arrival = await Arrival.of(
                landing,
                asked,
                options,
                self._paused,
                partial(journal.discarded, self._name),
                partial(journal.whole, self._name),
                self._around.share,
            )
            if arrived is not None:
                arrived(self.arrival)
            await asked
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)


async def _retake(landing: Landing, arriving: Arriving, kept: Kept) -> None:
    """Take the memory again: what was stored, and the rest from the VMM, which has kept it."""
    if not arriving.kept:
        raise FerryError(
            Reason.HANDOFF_NO_FD,
            f"the memory of guest {arriving.prepare.guest_id} cannot be taken again in the way it came; it waits",
        )
    found = kept.take(arriving.kept)
    missing = {name: file_id for name, file_id in arriving.kept.items() if name not in found}
    if missing:
        try:
            found |= await asyncio.to_thread(find_in, arriving.pid, missing)
        except BaseException:
            for fd in found.values():
                os.close(fd)
            raise
    landing.take_again(found, arriving.addresses)


def _layout_in(message: memory_pb2.MemoryLayout) -> Layout:
    try:
        return layout_of(message)
    except LayoutError as error:
        raise FerryError(Reason.LAYOUT_INVALID, f"the source's memory layout cannot be: {error}") from error
