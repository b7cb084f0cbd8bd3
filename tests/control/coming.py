"""A guest that comes to this host: a real hand-off, real lanes, and a VMM that stands in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in_vmm import PAGES, StandInVmm

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, memory_pb2, migration_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.config import Limits, Settings
from pageferryd.control.incoming import Incoming
from pageferryd.control.journal import Journal
from pageferryd.control.record import MigrationRecord
from pageferryd.control.registry import GuestRegistry
from pageferryd.control.surroundings import Surroundings
from pageferryd.core.errors import IllegalTransitionError
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.core.lifecycle import State
from pageferryd.server import GrpcServer
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService, layout_to_proto
from pageferryd.source.served import Served
from pageferryd.vmm.driver import Activity

DEADLINE = 10.0
TOKEN = b"t" * 32
CONTENT = b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(PAGES))
STATE = incoming_pb2.HandOverRequest(migration_id="m", state=b"state")
BOOM = FerryError(Reason.NO_SPACE, "as the test says")


class Coming:
    """A VMM that waits on this host, and a source that serves it from this process."""

    def __init__(self, directory: Path, prepare_timeout: float = 5.0, handover_timeout: float = 5.0) -> None:
        limits = Limits(
            reconnect_initial_seconds=0.001,
            reconnect_max_seconds=0.01,
            prepare_timeout=prepare_timeout,
            handover_timeout=handover_timeout,
        )
        settings = Settings(host="b", listen=["127.0.0.1:0"], insecure=True, runtime_dir=directory, limits=limits)
        self.vmm = StandInVmm(Activity.INCOMING)
        self.guests = GuestRegistry({"stand-in": lambda _address: self.vmm})
        self._around = Surroundings(settings, None, self.guests, Journal(directory / "journal.d"))
        self._left = GuestMemory(len(CONTENT))
        self._left.write(0, CONTENT)
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self._left.address))
        source = SourceMemory.open(self.vmm.layout, [location], os.getpid())
        self.completed = asyncio.Event()
        self.served = Served("m", TOKEN, "b", source, self.vmm.layout, self.completed.set)
        self.served.open()
        self._pages = PageService(secure=False)
        self._pages.offer(self.served)
        self.server = GrpcServer(settings)
        self._pages.add_to(self.server.server)

    async def start(self) -> None:
        (self.address,) = await self.server.start()
        await self.guests.register("g", "stand-in", "here")
        self.record = MigrationRecord(
            "m", "", "g", migration_pb2.ROLE_DESTINATION, "a", "b", "", migration_pb2.Limits()
        )
        self.incoming = Incoming(self.record, self.guests.claim("g", "m"), self._around)
        self.vmm.calls.clear()

    def request(
        self,
        layout: Layout | None = None,
        token: bytes = TOKEN,
        address: str = "",
        driver: str = "stand-in",
        machine: str = "",
        told_later: bool = False,
    ) -> incoming_pb2.PrepareRequest:
        return incoming_pb2.PrepareRequest(
            migration_id="m",
            guest_id="g",
            protocol_version=1,
            layout=None if told_later else layout_to_proto(layout or self.vmm.layout),
            page_address=address or self.address,
            source_name="a",
            token=token,
            driver=driver,
            machine=machine,
        )

    async def prepared(self) -> None:
        await self.incoming.prepare(self.request())

    async def handed_over(self) -> None:
        await self.prepared()
        await self.incoming.hand_over(STATE)

    async def refused(self, call: object) -> Reason:
        with pytest.raises((FerryError, IllegalTransitionError)) as refused:
            await asyncio.wait_for(call, DEADLINE)  # type: ignore[call-overload]
        return Reason(refused.value.reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.001)

    async def assert_never_ran(self) -> None:
        """It has ended, nothing is held any more, and no commit can run it."""
        assert self.record.state is State.FAILED
        assert not self.vmm.runs
        assert self.incoming.arrival is None
        assert self.guest_is_free()
        assert await self.refused(self.incoming.commit()) is Reason.NEVER_RAN
        assert "resume" not in self.vmm.calls
        assert not self.completed.is_set()

    def guest_is_free(self) -> bool:
        try:
            return self.guests.get("g").migration_id is None
        except FerryError:
            return True

    async def stop(self) -> None:
        for gate in self.vmm.gates.values():
            gate.opened.set()
        await self.incoming.stop()
        arrival = self.incoming.arrival
        if arrival is not None:
            await arrival.abandon()
        await self.guests.close()
        await self.server.stop(0)
        self._pages.withdraw("m")
        self.vmm.free()
        self._left.close()
