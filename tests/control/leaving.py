"""A guest on a host of this process, a destination that stands in, and the migration between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from stand_in_destination import StandInDestination
from stand_in_vmm import StandInVmm

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2_grpc, migration_pb2
from pageferryd.config import Limits, Settings
from pageferryd.control.book import MigrationBook
from pageferryd.control.departure import PageAddresses
from pageferryd.control.journal import Journal
from pageferryd.control.outgoing import Outgoing
from pageferryd.control.record import MigrationRecord
from pageferryd.control.recovery import recover_departures
from pageferryd.control.registry import GuestRegistry
from pageferryd.control.surroundings import Surroundings
from pageferryd.server import GrpcServer
from pageferryd.source.page_service import PageService

DEADLINE = 10.0
BOOM = FerryError(Reason.NO_SPACE, "as the test says")


class Departure:
    """A guest on this host, a destination that stands in, and the migration between them."""

    def __init__(self, directory: Path) -> None:
        limits = Limits(reconnect_initial_seconds=0.001, reconnect_max_seconds=0.01)
        self.settings = Settings(
            host="a", listen=[f"unix:{directory}/s"], insecure=True, runtime_dir=directory, limits=limits
        )
        self.vmm = StandInVmm()
        self.there = StandInDestination()
        self.pages = PageService(secure=False)
        self.guests = GuestRegistry({"stand-in": lambda _address: self.vmm})
        # Both hosts' services are on one server: addresses are all that tells them apart.
        self.server = GrpcServer(self.settings)
        incoming_pb2_grpc.add_IncomingServiceServicer_to_server(self.there, self.server.server)
        self.pages.add_to(self.server.server)

    async def start(self) -> None:
        (self.address,) = await self.server.start()
        await self.guests.register("g", "stand-in", "here")
        self.vmm.calls.clear()

    def begin(self) -> Outgoing:
        self.record = MigrationRecord(
            "m", "r", "g", migration_pb2.ROLE_SOURCE, "a", "b", self.address, migration_pb2.Limits()
        )
        guest = self.guests.claim("g", "m")
        self.outgoing = Outgoing(
            self.record,
            guest,
            self.around(),
            self.pages,
            PageAddresses(self.address),
        )
        return self.outgoing

    def around(self) -> Surroundings:
        return Surroundings(self.settings, None, self.guests, Journal(self.settings.runtime_dir / "journal.d"))

    async def again(self) -> Outgoing:
        """Go on as a sidecar does that finds the notes of one that was killed."""
        self.guests = GuestRegistry({"stand-in": lambda _address: self.vmm})
        self.vmm.calls.clear()
        self.there.calls.clear()
        book = MigrationBook(8, self.pages.withdraw)
        await recover_departures(self.around(), book, self.pages)
        mover = book.get("m")
        assert isinstance(mover, Outgoing)
        self.outgoing, self.record = mover, mover.record
        return mover

    def notes(self) -> list[str]:
        return sorted(path.name for path in self.settings.runtime_dir.glob("journal.d/*"))

    async def ended(self) -> None:
        await asyncio.wait_for(asyncio.wait([self.outgoing._task]), DEADLINE)
        assert self.record.state.final

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.001)

    def assert_here_alone(self) -> None:
        assert self.vmm.runs
        assert not self.there.runs
        assert self.guests.get("g").migration_id is None

    def assert_there_alone(self) -> None:
        assert self.there.runs
        assert not self.vmm.runs
        assert "resume" not in self.vmm.calls

    async def stop(self) -> None:
        self.there.reports.put_nowait(None)
        for gates in (self.there.gates, self.vmm.gates):
            for gate in gates.values():
                gate.opened.set()
        if not self.outgoing._task.done():
            await self.outgoing.stop()
        await self.guests.close()
        await self.server.stop(0)
        self.vmm.free()
