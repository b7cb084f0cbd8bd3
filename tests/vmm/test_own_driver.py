"""The driver for VmmService: with the process guest as a real VMM, and with VMMs that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from driver_conformance import DriverConformance, activity, reason_of

from pageferry.errors import FerryError, Reason
from pageferry.vmm import MemoryDescription, ProcessMemory, Region, Vmm, VmmServer, VmmState
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.vmm import own
from pageferryd.vmm.driver import Activity
from pageferryd.vmm.own import VmmServiceDriver

MEMORY = 1 << 20


class ProcessGuestHouse:
    memory_bytes = MEMORY

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self._process = process
        self._path = path
        self.pid = process.pid
        self.driver = VmmServiceDriver(str(path))

    @classmethod
    async def start(cls, path: Path, *more: str) -> ProcessGuestHouse:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "pageferry.guests.process", "--socket", str(path), "--memory", str(MEMORY)]
        process = await asyncio.create_subprocess_exec(*command, "--seed", "1", *more, stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while json.loads(await process.stdout.readline())["event"] != "ready":
                pass
        return cls(process, path)

    def another_driver(self) -> VmmServiceDriver:
        return VmmServiceDriver(str(self._path))

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def ended(self) -> None:
        await self._process.communicate()

    async def stop(self) -> None:
        await self.driver.close()
        await self.end()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[ProcessGuestHouse]:
    house = await ProcessGuestHouse.start(tmp_path / "v")
    yield house
    await house.stop()


@pytest.fixture
async def incoming(tmp_path: Path) -> AsyncIterator[ProcessGuestHouse]:
    house = await ProcessGuestHouse.start(tmp_path / "v", "--incoming")
    yield house
    await house.stop()


class TestVmmServiceDriver(DriverConformance):
    """Passes what every driver must."""


class Odd(Vmm):
    """Does what a test says."""

    def __init__(self) -> None:
        self.state = VmmState.RUNNING
        self.regions = [Region(0, PAGE_SIZE, location=ProcessMemory(0x1000))]
        self.failure: BaseException | None = None
        self.waiting = False

    async def describe_memory(self) -> MemoryDescription:
        return MemoryDescription(self.state, self.regions)

    async def attach_pager(self, socket_path: str) -> None: ...

    async def pause(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.waiting:
            await asyncio.Event().wait()
        self.state = VmmState.PAUSED

    async def save_state(self) -> bytes:
        return bytes(64 << 20)

    async def load_state(self, state: bytes) -> None: ...

    async def resume(self) -> None: ...

    async def detach_pager(self) -> None: ...

    async def kill(self) -> None: ...


@pytest.fixture
async def odd(tmp_path: Path) -> AsyncIterator[tuple[Odd, VmmServiceDriver]]:
    vmm, server = Odd(), VmmServer()
    await server.start(vmm, str(tmp_path / "v"))
    driver = VmmServiceDriver(str(tmp_path / "v"))
    yield vmm, driver
    await driver.close()
    await server.stop(0)


OddHouse = tuple[Odd, VmmServiceDriver]


async def test_a_layout_that_cannot_be_is_refused(odd: OddHouse) -> None:
    vmm, driver = odd
    here = ProcessMemory(0x1000)
    for regions in (
        [],
        [Region(0, 100, location=here)],
        [Region(0, PAGE_SIZE, 8192, here)],
        [Region(0, 2 * PAGE_SIZE, location=here), Region(PAGE_SIZE, PAGE_SIZE, location=here)],
    ):
        vmm.regions = regions
        assert await reason_of(driver.describe()) is Reason.LAYOUT_INVALID


async def test_a_reason_of_the_vmms_own_is_kept(odd: OddHouse) -> None:
    vmm, driver = odd
    vmm.failure = FerryError(Reason.NO_SPACE, "no room to breathe")
    with pytest.raises(FerryError, match="no room to breathe") as refused:
        await driver.pause()
    assert refused.value.reason is Reason.NO_SPACE


async def test_any_other_failure_is_one_of_the_vmm(odd: OddHouse) -> None:
    vmm, driver = odd
    vmm.failure = RuntimeError("oops")
    assert await reason_of(driver.pause()) is Reason.VMM_FAILED
    assert await activity(driver) is Activity.RUNNING


async def test_a_vmm_that_does_not_answer_counts_as_out_of_reach(
    odd: OddHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm, driver = odd
    vmm.waiting = True
    monkeypatch.setattr(own.VmmServiceDriver._call, "__defaults__", (0.05,))
    monkeypatch.setattr(own, "_STATE_SECONDS", 0.05)
    assert await reason_of(driver.pause()) is Reason.VMM_UNREACHABLE


async def test_a_state_of_64_mib_crosses(odd: OddHouse) -> None:
    vmm, driver = odd
    vmm.state = VmmState.PAUSED
    assert len((await driver.save_state()).state) == 64 << 20


async def test_a_vmm_that_does_not_end_when_it_is_told_to_is_reported(
    odd: OddHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, driver = odd
    monkeypatch.setattr(own, "_EXIT_SECONDS", 0.05)
    await driver.describe()
    assert await reason_of(driver.kill()) is Reason.VMM_FAILED


async def test_a_vmm_that_does_not_accept_is_out_of_reach(tmp_path: Path) -> None:
    path = str(tmp_path / "v")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        driver = VmmServiceDriver(path)
        assert await reason_of(driver.describe()) is Reason.VMM_UNREACHABLE
        await driver.close()


@pytest.mark.parametrize("path", ["relative", "", "/" + 120 * "x"])
async def test_a_path_that_no_socket_can_have_is_refused(path: str) -> None:
    with pytest.raises(FerryError) as refused:
        VmmServiceDriver(path)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
