"""A guest on its way out, as far as the step that gives it away: offered, noted, stopped, handed over."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2
from pageferryd.control.departures_journal import Leaving, LeftMemory
from pageferryd.control.exporting import exporter
from pageferryd.control.fitting import refuse_immovable
from pageferryd.control.keeping import Kept
from pageferryd.control.peer import PROTOCOL_VERSION, Destination
from pageferryd.control.view import layout_of, migration_of
from pageferryd.core.lifecycle import State
from pageferryd.core.refusals import VMM
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.proc import is_process, started_at
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import layout_to_proto
from pageferryd.source.served import TOKEN_BYTES, Served
from pageferryd.vmm.driver import Memory, PrivatePages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.source.page_service import PageService
    from pageferryd.vmm.driver import Description


class PageAddresses(NamedTuple):
    """Where destinations reach this host's page service, and its lanes over sockets (empty where there are none)."""

    grpc: str
    lanes: str = ""


class Departure:
    """One guest's. `completed` is called when the destination says that it has every page."""

    def __init__(
        self,
        record: MigrationRecord,
        guest: Guest,
        around: Surroundings,
        pages: PageService,
        addresses: PageAddresses,
        completed: Callable[[], None],
    ) -> None:
        self._record = record
        self._guest = guest
        self._around = around
        self._pages = pages
        self._addresses = addresses
        self._completed = completed
        self._announced = record.limits
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._leaving: Leaving | None = None
        self._memory: Memory | None = None
        self._source: SourceMemory | None = None
        self._kept = Kept(around.store, record.migration_id)
        self.destination: Destination | None = None
        self.served: Served | None = None
        self.paused_at: float | None = None
        """When the guest was stopped, on the monotonic clock; None where that was not by this process."""
        self.stopped = False
        """Whether the guest may stand still."""

    def peer(self) -> Destination:
        """Return the destination. FerryError(ILLEGAL_STATE) before there is one."""
        if self.destination is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self._record.migration_id} has no destination yet")
        return self.destination

    async def prepare(self) -> None:
        """Ready both ends; the guest runs on. Can be done again after `start_over`."""
        record, guest = self._record, self._guest
        record.lifecycle.to(State.PREPARING)
        description = await guest.driver.describe()
        refuse_immovable(guest, description)
        answer = await self._meet().probe(guest.guest_id)
        if not record.destination_name:
            record.destination_name = answer.host
        if description.memory is not None:
            self._offer(description.memory)
        await self._have_prepared(description)
        while self._announced is not record.limits:
            # They were changed meanwhile.
            self._announced = record.limits
            await self.peer().limit(record.limits)
        self._leaving = Leaving(
            migration_of(record),
            guest.driver_name,
            guest.address,
            description.pid,
            started_at(description.pid),
            self._token,
        )
        await guest.driver.ready_to_pause()

    async def start_over(self) -> None:
        """Forget what `prepare` did at this end: the destination has taken nothing."""
        self._pages.withdraw(self._record.migration_id)
        self.served = None
        await self.close()
        self._record.lifecycle.to(State.PENDING)

    def _meet(self) -> Destination:
        record = self._record
        self.destination = Destination(
            record.destination_address, record.destination_name, self._around.tls, record.migration_id
        )
        return self.destination

    def _offer(self, memory: Memory) -> Served:
        """Offer the memory to the destination; it is not read yet."""
        try:
            source = SourceMemory.open(memory.layout, memory.locations, memory.holder)
        except FerryError as error:
            if error.reason is Reason.MEMORY_NOT_ITS_OWN:
                whose = f"the VMM of guest {self._record.guest_id}"
                self._around.refusals.note(VMM, error.reason, whose, error.message)
            raise
        return self._serve(memory, source)

    def _serve(self, memory: Memory, source: SourceMemory) -> Served:
        record, layout = self._record, memory.layout
        self._memory, self._source = memory, source
        self.served = Served(
            record.migration_id,
            self._token,
            record.destination_name,
            source,
            layout,
            self._completed,
            checksums=record.policy.checksums,
        )
        self._pages.offer(self.served)
        return self.served

    async def _have_prepared(self, description: Description) -> None:
        """Have the destination's VMM readied."""
        record, memory = self._record, description.memory
        self._announced = record.limits
        request = incoming_pb2.PrepareRequest(
            migration_id=record.migration_id,
            guest_id=record.guest_id,
            protocol_version=PROTOCOL_VERSION,
            layout=layout_to_proto(memory.layout) if memory is not None else None,
            page_address=self._addresses.grpc,
            lane_address=self._addresses.lanes,
            source_name=record.source_name,
            token=self._token,
            limits=record.limits,
            driver=self._guest.driver_name,
            machine=description.machine,
            policy=record.policy,
        )
        await self.peer().prepare(request, self._around.settings.limits.prepare_timeout + 5.0)

    async def hand_over(self) -> None:
        """Stop the guest, and send what it is beside its memory."""
        driver, journal = self._guest.driver, self._around.journal.departures
        if self._leaving is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"migration {self._record.migration_id} was not prepared")
        self._record.lifecycle.to(State.HANDING_OVER)
        # A sidecar that is killed while the guest stands still must find it again.
        journal.leaves(self._leaving)
        self.paused_at, self.stopped = time.monotonic(), True
        await driver.pause()
        saved, private = await asyncio.gather(driver.save_state(), driver.private_pages())
        told_now = None
        if saved.memory is not None:
            self._offer(saved.memory)
            told_now = layout_to_proto(saved.memory.layout)
        served, memory, source = self._offered()
        self._open(served, private)
        await self._keep()
        journal.leaves(replace(self._leaving, memory=_left(memory, private, source.files)))
        await self.peer().hand_over(saved.state, told_now, self._around.settings.limits.handover_timeout + 2.0)

    async def _keep(self) -> None:
        """Store what of the memory outlives its VMM, if anybody stores."""
        if self._source is not None and self._around.store.available:
            await self._kept.keep(self._source.files)

    async def drop_kept(self) -> None:
        """No later sidecar needs the memory any more."""
        await self._kept.drop()

    def _offered(self) -> tuple[Served, Memory, SourceMemory]:
        if self.served is None or self._memory is None or self._source is None:
            raise FerryError(Reason.VMM_FAILED, f"the VMM of guest {self._guest.guest_id} did not tell its memory")
        return self.served, self._memory, self._source

    def _open(self, served: Served, private: PrivatePages) -> None:
        layout = served.layout
        runs = [layout.run_at(address, size) for address, size in private.ranges]
        served.open(runs, exporter(self._guest.driver, layout) if private.opaque else None)

    def take_up(self, leaving: Leaving) -> None:
        """Find the destination of a guest again that an earlier sidecar of this host was handing over."""
        self._leaving, self._token = leaving, leaving.token
        self.stopped = True
        self._meet()

    def serve_again(self) -> None:
        """Serve the memory of a guest that has gone again. FerryError: VMM_GONE, MEMORY_UNREADABLE."""
        memory = self._leaving.memory if self._leaving is not None else None
        if memory is None:
            raise FerryError(Reason.INTERNAL, f"migration {self._record.migration_id} noted no memory")
        layout = layout_of(memory.layout)
        holder = memory.holder if is_process(memory.holder, memory.started) else None
        source = SourceMemory.open(layout, memory.locations, holder, self._kept.take(memory.files))
        served = self._serve(Memory(layout, memory.locations, memory.holder), source)
        self._open(served, PrivatePages(memory.private, memory.opaque))

    @property
    def vmm_ended(self) -> bool:
        """Whether the VMM that the guest was prepared in is no more."""
        leaving = self._leaving
        return leaving is not None and not is_process(leaving.pid, leaving.started)

    def refuse_lost(self) -> None:
        """Raise FerryError(VMM_GONE) where the VMM has ended, and the guest's memory with it."""
        if self.vmm_ended and self._source is not None and not self._source.outlives_vmm:
            raise FerryError(
                Reason.VMM_GONE, f"the VMM of guest {self._guest.guest_id} ended, and the guest's memory with it"
            )

    def kill_vmm(self) -> None:
        """Kill the VMM by its process, as it does not answer. FerryError(VMM_*)."""
        leaving = self._leaving
        if leaving is not None and not self.vmm_ended:
            with PidFd(leaving.pid) as process:
                process.send_signal(signal.SIGKILL)

    async def close(self) -> None:
        """Let the connection go, and the memory: the page service keeps what answers a late question."""
        if self.served is not None:
            self.served.close()
        self._source = self._memory = None
        # gRPC keeps a closed channel's connection for as long as anybody refers to the channel.
        destination, self.destination = self.destination, None
        if destination is not None:
            await destination.close()


def _left(memory: Memory, private: PrivatePages, files: Mapping[str, int]) -> LeftMemory:
    return LeftMemory(
        layout_to_proto(memory.layout),
        memory.locations,
        memory.holder,
        started_at(memory.holder),
        private.ranges,
        private.opaque,
        sorted(files),
    )
