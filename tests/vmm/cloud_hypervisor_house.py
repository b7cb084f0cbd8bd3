"""Cloud Hypervisor stand-ins with their drivers, and a pager for the driver's tests."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import pytest

from cloud_hypervisor_child import CloudHypervisor
from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.destination.given_files import GivenMemory
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from pageferryd.vmm.driver import FaultEndpoint, GivenFiles, GuardedMemory, Memory, Saved

DEADLINE = 10.0
MIB = 1 << 20
SMALL = ("--memory", "4")


class Host:
    """Makes VMMs and their drivers, and takes them down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime_dir = directory / "run"
        self._made: list[tuple[CloudHypervisor, CloudHypervisorDriver]] = []
        self._seats: list[Seat] = []

    async def vmm(self, *options: str) -> tuple[CloudHypervisor, CloudHypervisorDriver]:
        path = self.directory / f"{len(self._made)}.sock"
        vmm = await CloudHypervisor.start(path, *options)
        made = vmm, CloudHypervisorDriver(str(path), self.runtime_dir)
        self._made.append(made)
        return made

    async def running(self, *options: str) -> tuple[CloudHypervisor, CloudHypervisorDriver]:
        """A guest that runs, and whose driver knows its process."""
        vmm, driver = await self.vmm(*SMALL, *options)
        await driver.describe()
        return vmm, driver

    async def incoming(self, *options: str) -> tuple[CloudHypervisor, CloudHypervisorDriver]:
        vmm, driver = await self.vmm("--incoming", *options)
        await driver.describe()
        return vmm, driver

    def seat_for(self, source: Memory, vmm: CloudHypervisor) -> Seat:
        """Where the memory of a guest comes down that a VMM waits for."""
        directory = VmmDirectory.make(self.runtime_dir, f"m{len(self._seats)}", vmm.pid)
        self._seats.append(Seat(source, directory))
        return self._seats[-1]

    async def close(self) -> None:
        for seat in self._seats:
            seat.close()
        for vmm, driver in self._made:
            await driver.close()
            await vmm.close()
        # A refused call is kept by its error, with the connection of its frames.
        gc.collect()


class Seat:
    """A pager's seat whose pager copies pages from the source's memory files at once."""

    faults = FaultEndpoint("/nowhere", b"f" * 32)
    socket_path = "/nowhere"

    def __init__(self, source: Memory, directory: VmmDirectory) -> None:
        self.layout: Layout = source.layout
        self.directory = directory
        self.failures: list[Exception] = []
        self.faulted: list[int] = []
        self._source = source
        self.given: GivenMemory | None = None

    def take(self, memory: GuardedMemory | GivenFiles) -> None:
        assert isinstance(memory, GivenFiles)
        self.given = GivenMemory(self.layout, memory.files, memory.connection)
        self.given.doors()[1][0].open(self._fill, self.failures.append)

    def _fill(self, events: DoorEvents) -> None:
        assert self.given is not None
        door = self.given.doors()[1][0]
        for page in events.faults:
            self.faulted.append(page)
            piece = next(self.layout.pieces(page, 1))
            memfd = self._source.locations[piece.region].memfd
            data = os.pread(memfd.fd, PAGE_SIZE, memfd.offset + piece.first * PAGE_SIZE)
            if any(data):
                self.given.installer().raw(page, 1, data, 0)
            door.settled(page, 1, Settled.INSTALLED)

    def close(self) -> None:
        if self.given is not None:
            self.given.close()
        self.directory.remove()


async def refused(call: Awaitable[object], *reasons: Reason) -> FerryError:
    with pytest.raises(FerryError) as error:
        await asyncio.wait_for(call, DEADLINE)
    assert error.value.reason in reasons, error.value
    return error.value


async def take(driver: CloudHypervisorDriver) -> tuple[Saved, Memory]:
    await driver.pause()
    saved = await driver.save_state()
    assert saved.memory is not None
    return saved, saved.memory


def descriptors() -> Counter[str]:
    """What this process has open, but for the pipes to VMMs, which may end."""
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found[str(link.readlink()).partition(":[")[0]] += 1
    del found["pipe"]
    return found
