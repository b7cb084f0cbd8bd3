"""What every VMM driver does: a subclass gives the fixtures `running` and `incoming`."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.linux.unix_peer import recv_with_fds
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm.driver import Activity, FaultEndpoint, VmmDriver

DEADLINE = 20.0


class Seat:
    """A pager's seat where nobody sits."""

    layout = Layout([Region(0, PAGE_SIZE)])
    faults = FaultEndpoint("/nowhere", b"f" * 32)

    def __init__(self, path: Path) -> None:
        self.directory = VmmDirectory(-1, path.parent, path.parent)
        self.socket_path = str(path)

    def take(self, memory: object) -> None:
        raise AssertionError(memory)


class House(Protocol):
    """A VMM in a process of its own, and a driver for it."""

    driver: VmmDriver
    pid: int
    memory_bytes: int

    def another_driver(self) -> VmmDriver:
        """Return a second driver for the same VMM."""

    async def end(self) -> None:
        """End the VMM from outside, and wait until it has."""

    async def ended(self) -> None:
        """Wait until the VMM has ended."""


Calls = dict[str, Callable[[VmmDriver], Awaitable[object]]]
CALLS: Calls = {
    "describe": lambda driver: driver.describe(),
    "attach_pager": lambda driver: driver.attach_pager(Seat(Path("/nowhere"))),
    "pause": lambda driver: driver.pause(),
    "save_state": lambda driver: driver.save_state(),
    "load_state": lambda driver: driver.load_state(b""),
    "resume": lambda driver: driver.resume(),
    "detach_pager": lambda driver: driver.detach_pager(),
}


async def reason_of(call: Awaitable[object]) -> Reason:
    with pytest.raises(FerryError) as refused:
        await asyncio.wait_for(call, DEADLINE)
    return refused.value.reason


async def activity(driver: VmmDriver) -> Activity:
    return (await driver.describe()).activity


async def attach(driver: VmmDriver, path: Path) -> tuple[socket.socket, list[int]]:
    """Have the memory handed over; return the connection and the descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        await driver.attach_pager(Seat(path))
        listener.setblocking(False)
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    connection.setblocking(True)
    return connection, recv_with_fds(connection, 65536, 3).fds


class DriverConformance:
    async def test_a_running_vmm_tells_its_memory_and_where_to_read_it(self, running: House) -> None:
        description = await running.driver.describe()
        assert description.activity is Activity.RUNNING
        assert description.pid == running.pid
        assert sum(region.size for region in description.layout.regions) == running.memory_bytes
        assert description.memory is not None
        assert description.memory.layout is description.layout
        assert description.memory.holder == running.pid
        assert len(description.memory.locations) == len(description.layout.regions)

    async def test_pause_and_resume_stop_the_guest_and_let_it_run(self, running: House) -> None:
        driver = running.driver
        await driver.describe()
        await driver.pause()
        assert await activity(driver) is Activity.PAUSED
        await driver.pause()
        assert (await driver.save_state()).state
        assert not (await driver.private_pages()).ranges
        assert await activity(driver) is Activity.PAUSED
        await driver.resume()
        assert await activity(driver) is Activity.RUNNING
        await driver.resume()
        assert await activity(driver) is Activity.RUNNING

    async def test_the_state_of_a_running_guest_is_refused(self, running: House) -> None:
        assert await reason_of(running.driver.save_state()) is Reason.ILLEGAL_STATE
        assert await activity(running.driver) is Activity.RUNNING

    async def test_a_running_vmm_takes_no_guest_in(self, running: House) -> None:
        assert await reason_of(running.driver.attach_pager(Seat(Path("/nowhere")))) is Reason.ILLEGAL_STATE
        assert await reason_of(running.driver.load_state(b"state")) is Reason.ILLEGAL_STATE
        assert await activity(running.driver) is Activity.RUNNING

    async def test_an_incoming_vmm_tells_its_memory_and_nowhere_to_read_it(self, incoming: House) -> None:
        description = await incoming.driver.describe()
        assert description.activity is Activity.INCOMING
        assert description.pid == incoming.pid
        assert sum(region.size for region in description.layout.regions) == incoming.memory_bytes
        assert description.memory is None

    async def test_an_incoming_vmm_does_not_run_before_it_has_a_guest(self, incoming: House) -> None:
        assert await reason_of(incoming.driver.resume()) is Reason.ILLEGAL_STATE
        assert await reason_of(incoming.driver.pause()) is Reason.ILLEGAL_STATE
        assert await reason_of(incoming.driver.save_state()) is Reason.ILLEGAL_STATE
        assert await activity(incoming.driver) is Activity.INCOMING

    @pytest.mark.userfaultfd
    async def test_an_incoming_vmm_hands_its_memory_over_once(self, incoming: House, tmp_path: Path) -> None:
        connection, fds = await attach(incoming.driver, tmp_path / "p")
        assert len(fds) == 1
        assert os.readlink(f"/proc/self/fd/{fds[0]}") == "anon_inode:[userfaultfd]"  # noqa: PTH115
        assert await activity(incoming.driver) is Activity.INCOMING
        assert await reason_of(incoming.driver.attach_pager(Seat(tmp_path / "p"))) is Reason.ILLEGAL_STATE
        os.close(fds[0])
        connection.close()

    async def test_a_pager_that_is_not_there_is_an_error_of_the_vmm(self, incoming: House, tmp_path: Path) -> None:
        assert await reason_of(incoming.driver.attach_pager(Seat(tmp_path / "nobody"))) is Reason.VMM_FAILED
        assert await activity(incoming.driver) is Activity.INCOMING

    async def test_kill_ends_the_vmm_and_is_harmless_afterwards(self, running: House) -> None:
        await running.driver.describe()
        await running.driver.kill()
        await asyncio.wait_for(running.ended(), DEADLINE)
        await running.driver.kill()

    async def test_kill_ends_an_incoming_vmm(self, incoming: House) -> None:
        await incoming.driver.describe()
        await incoming.driver.kill()
        await asyncio.wait_for(incoming.ended(), DEADLINE)

    async def test_a_vmm_that_has_ended_cannot_be_reached(self, running: House) -> None:
        await running.driver.describe()
        await running.end()
        for name, call in CALLS.items():
            assert await reason_of(call(running.driver)) is Reason.VMM_UNREACHABLE, name
        await running.driver.kill()

    async def test_closing_a_driver_leaves_the_vmm_alone(self, running: House) -> None:
        await running.driver.describe()
        await running.driver.close()
        await running.driver.close()
        another = running.another_driver()
        assert await activity(another) is Activity.RUNNING
        await another.close()
