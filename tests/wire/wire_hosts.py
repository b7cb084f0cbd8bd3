"""Two hosts in one process: a source that serves a guest's pages, and a session that brings them, through a proxy."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from guarded import Guarded, contents
from wire_proxy import WireProxy

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.config import Settings
from pageferryd.control.lane_server import LaneServer
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.destination.grpc_lanes import GrpcLaneOpener
from pageferryd.destination.page_calls import Source
from pageferryd.destination.session import Session, SessionOptions
from pageferryd.destination.socket_lanes import SocketLaneOpener
from pageferryd.destination.uffd_door import UffdDoor
from pageferryd.destination.uffd_installer import UffdInstaller
from pageferryd.server import GrpcServer
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Served

T = TypeVar("T")
DEADLINE = 30.0
PAGES = 1024
SILENCE = 0.5
"""Seconds: what limits.lane_silence_timeout would be."""
PATIENCE = 10.0
"""Seconds: the same where nothing is to be taken for silence, however busy the machine is."""
TOKEN = b"t" * 32
LOSSES = {Reason.LANE_LOST, Reason.SOURCE_UNREACHABLE}
NOTICED = {Reason.LANE_SILENT, *LOSSES}


async def of(future: Future[T]) -> T:
    return await asyncio.wait_for(asyncio.wrap_future(future), DEADLINE)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not holds():  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.005)


class SourceHost:
    """Serves the guest of migration "m": PAGES pages, none of them zero."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.completions = 0
        self._memories: list[GuestMemory] = []
        self.pages = PageService(secure=False)
        settings = Settings(host="source", listen=["127.0.0.1:0"], insecure=True)
        self._server = GrpcServer(settings)
        self.pages.add_to(self._server.server)
        self.lanes = LaneServer(settings, self.pages)
        self.served = self.offers()

    async def start(self) -> str:
        (bound,) = await self._server.start()
        await self.lanes.start(bound, bound)
        return bound

    async def stop(self) -> None:
        await self.lanes.stop()
        await self._server.stop(0)
        self.pages.withdraw("m")
        for memory in self._memories:
            memory.close()

    def offers(self, *, token: bytes = TOKEN, pages: int = PAGES, first: int = 0, is_open: bool = True) -> Served:
        """Serve a guest from now on, in place of any before; page p of it has the contents of page `first` + p."""
        self.pages.withdraw("m")
        memory = GuestMemory(pages * PAGE_SIZE)
        self._memories.append(memory)
        memory.write(0, contents(first, pages))
        layout = self.layout if pages == PAGES else Layout([Region(0, pages * PAGE_SIZE)])
        process = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=memory.address))
        read = SourceMemory.open(layout, [process], os.getpid())
        served = Served("m", token, "destination", read, layout, self._complete)
        if is_open:
            served.open()
        self.pages.offer(served)
        self.served = served
        return served

    def forgets(self) -> None:
        """Serve nothing any more."""
        self.pages.withdraw("m")

    def _complete(self) -> None:
        self.completions += 1


class Arrival:
    """The destination: a session over one kind of lanes. `paused` is what it told of these, in order."""

    def __init__(self, guarded: Guarded, source: Source, kind: str, *, push: bool, silence: float) -> None:
        self.guarded = guarded
        self.paused: list[Reason | None] = []
        self.missing: list[int] = []
        """How many pages were missing each time."""
        self._changed = asyncio.Event()
        over_grpc = GrpcLaneOpener(source, None, silence)
        opener = SocketLaneOpener(source, None, silence, over_grpc) if kind == "sockets" else over_grpc
        pager = PagerOptions(silence=silence, fault_around=0, pacing=PacingOptions(disabled=not push))
        self.session = Session(
            guarded.layout,
            [UffdDoor(guarded.uffd, guarded.addresses)],
            UffdInstaller(guarded.uffd, guarded.addresses),
            opener,
            SessionOptions(pager, backoff_initial=0.01, backoff_max=0.05),
            self._note,
        )
        self.session.open_doors()
        self.running = asyncio.create_task(self.session.run())
        self.session.start_push()

    async def until_paused(self, *reasons: Reason | None, behind: int = 0) -> Reason | None:
        """Wait until it told one of the reasons, later than the first `behind` that it told."""
        async with asyncio.timeout(DEADLINE):
            while not any(one in reasons for one in self.paused[behind:]):
                assert not self.running.done(), self.running
                self._changed.clear()
                await self._changed.wait()
        return next(one for one in self.paused[behind:] if one in reasons)

    async def until_lost(self, failing: Future[None], *reasons: Reason) -> Reason | None:
        """Wait until the wire fails as it was told to, for good, and that was told: earlier losses are none of its."""
        await of(failing)
        return await self.until_paused(*reasons, behind=len(self.paused))

    async def lost_or_over(self, behind: int) -> bool:
        """Wait until it is over, or has told a loss later than the first `behind` that it told: whether it has."""
        await _until(lambda: self.running.done() or any(one in NOTICED for one in self.paused[behind:]))
        return not self.running.done()

    async def until_missing(self, pages: int) -> None:
        """Wait until no more than so many are missing."""
        await _until(lambda: self.session.pager.map.missing <= pages)

    async def until_still(self) -> None:
        """Wait until nothing is under way."""
        await _until(lambda: not self.session.pager.push_under_way and not self.session.pager.demand_under_way)

    async def is_whole(self) -> None:
        """Wait until it is over, and look at every byte."""
        await asyncio.wait_for(asyncio.shield(self.running), DEADLINE)
        await self.session.close()
        UffdInstaller(self.guarded.uffd, self.guarded.addresses).release()
        memory = self.guarded.read_all()
        wrong = [
            page for page in range(PAGES) if memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != contents(page, 1)
        ]
        assert wrong == []

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.session.close()
        self.guarded.close()

    def _note(self, error: FerryError | None) -> None:
        self.paused.append(None if error is None else error.reason)
        self.missing.append(self.session.pager.map.missing)
        self._changed.set()


class Hosts:
    """Both, and the wire between them."""

    def __init__(self, wire: WireProxy, kind: str) -> None:
        self.wire = wire
        self.kind = kind
        self._guarded = Guarded(PAGES)
        self.source = SourceHost(self._guarded.layout)
        self._arrival: Arrival | None = None

    async def start(self) -> None:
        bound = await self.source.start()
        self._source = Source("m", self.wire.to(bound), "source", TOKEN, self._guarded.layout)
        if self.kind == "sockets":
            self._source = replace(self._source, lane_address=self.wire.to(self.source.lanes.address))

    def arrive(self, *, push: bool = True, silence: float = SILENCE) -> Arrival:
        self._arrival = Arrival(self._guarded, self._source, self.kind, push=push, silence=silence)
        return self._arrival

    async def stop(self) -> None:
        if self._arrival is not None:
            await self._arrival.close()
        else:
            self._guarded.close()
        await self.source.stop()
