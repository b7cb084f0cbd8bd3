"""The QEMU driver against stock QEMUs that run nothing but their BIOS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu_process import BINARY, SECONDS, needs_qemu_and_root

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.linux.filled import filled
from pageferryd.linux.proc import open_files
from pageferryd.linux.userfaultfd import Userfaultfd
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm.driver import Activity, FaultEndpoint, GivenFiles, GuardedMemory
from pageferryd.vmm.qemu.driver import QemuDriver
from pageferryd.vmm.qemu.package import Package, pack, unpack

pytestmark = [*needs_qemu_and_root, pytest.mark.userfaultfd]

MIB = 1 << 20


class Seat:
    """Where a pager would sit: keeps what it is given."""

    layout = Layout([Region(0, PAGE_SIZE)])
    socket_path = "/nowhere"
    faults = FaultEndpoint("/nowhere", b"f" * 32)
    directory = VmmDirectory(-1, Path("/nowhere"), Path("/nowhere"))

    def __init__(self) -> None:
        self.taken: list[GuardedMemory] = []

    def take(self, memory: GuardedMemory | GivenFiles) -> None:
        assert isinstance(memory, GuardedMemory)
        self.taken.append(memory)


class House:
    """A QEMU that listens at its own monitor, and its driver."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.driver = QemuDriver(str(path))
        self.seat = Seat()

    @property
    def pid(self) -> int:
        return self.process.pid

    def descriptors(self) -> set[int]:
        return set(open_files(self.pid))

    def userfaultfds(self) -> list[int]:
        return [number for number, link in open_files(self.pid).items() if "userfaultfd" in link]

    def guarded(self) -> int:
        """How many mappings a userfaultfd guards."""
        lines = Path(f"/proc/{self.pid}/smaps").read_text().splitlines()
        return sum("um" in line.split() for line in lines if line.startswith("VmFlags:"))


Start = Callable[..., contextlib.AbstractAsyncContextManager[House]]


@asynccontextmanager
async def house(*arguments: str, incoming: bool = False) -> AsyncIterator[House]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "qmp"
        command = [
            BINARY,
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            f"unix:{path},server=on,wait=off",
        ]
        command += ["-incoming", "defer", "-S"] if incoming else []
        if "-m" not in arguments and not any("memory-backend" in one for one in arguments):
            command += ["-m", "32"]
        # Not asyncio's, which waits for it all the time: a traced child's stops would go to whoever waits.
        process = await asyncio.to_thread(subprocess.Popen, [*command, *arguments])
        made = House(process, path)
        try:
            async with asyncio.timeout(SECONDS):
                while not listens(path):  # noqa: ASYNC110 - QEMU tells nobody
                    await asyncio.sleep(0.01)
            yield made
        finally:
            await made.driver.close()
            for memory in made.seat.taken:
                os.close(memory.uffd)
            process.kill()
            process.wait(SECONDS)


def listens(path: Path) -> bool:
    """Say whether somebody listens at a socket: that it is bound is not enough, and a connection disturbs QEMU."""
    # proc_pid_net(5): num, refcount, protocol, flags, …, path; the flag is __SO_ACCEPTCON of linux/net.h.
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return any(one[-1] == str(path) and int(one[3], 16) & 1 << 16 for one in sockets)


async def reason_of(call: object) -> Reason:
    with pytest.raises(FerryError) as refused:
        await asyncio.wait_for(call, SECONDS)  # type: ignore[call-overload]
    return refused.value.reason


async def test_a_running_qemu_tells_its_memory_its_machine_and_that_nothing_is_in_the_way() -> None:
    async with house() as one:
        found = await one.driver.describe()
        assert (found.activity, found.pid, found.obstacles) == (Activity.RUNNING, one.pid, ())
        assert found.machine.startswith("pc-i440fx-")
        assert found.memory is not None
        assert found.layout is not None
        assert found.layout.regions[0].size == 32 * MIB
        assert len(found.memory.locations) == len(found.layout.regions)


async def test_shared_ram_is_read_through_its_file() -> None:
    backend = ("-object", "memory-backend-memfd,id=m,size=32M,share=on", "-machine", "pc,memory-backend=m")
    async with house(*backend) as one:
        found = await one.driver.describe()
        assert found.memory is not None
        assert found.memory.locations[0].WhichOneof("location") == "file"


async def test_it_is_stopped_saved_and_run_again_as_often_as_one_likes() -> None:
    async with house() as one:
        await one.driver.describe()
        for _ in range(2):
            await one.driver.pause()
            await one.driver.pause()
            first = await one.driver.save_state()
            assert unpack((await one.driver.save_state()).state) == unpack(first.state)
            assert (await one.driver.describe()).activity is Activity.PAUSED
            await one.driver.resume()
            await one.driver.resume()
        assert (await one.driver.describe()).activity is Activity.RUNNING
        assert await reason_of(one.driver.save_state()) is Reason.ILLEGAL_STATE


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param((), id="plain"),
        pytest.param(
            ("-object", "memory-backend-ram,id=m,size=64M,prealloc=on", "-machine", "pc,memory-backend=m"),
            id="preallocated",
        ),
        pytest.param(
            ("-object", "memory-backend-memfd,id=m,size=64M,prealloc=on", "-machine", "pc,memory-backend=m"),
            id="preallocated memfd",
        ),
    ],
)
async def test_a_waiting_qemu_is_emptied_guarded_and_in_the_end_left_as_it_was(backend: tuple[str, ...]) -> None:
    async with house(*backend, incoming=True) as one:
        assert (await one.driver.describe()).activity is Activity.INCOMING
        before = one.descriptors()
        await one.driver.attach_pager(one.seat)
        (memory,) = one.seat.taken
        assert len(one.userfaultfds()) == 1
        assert one.guarded() >= len(memory.addresses)
        layout = (await one.driver.describe()).layout
        assert layout is not None
        for address, region in zip(memory.addresses, layout.regions, strict=True):
            assert filled(one.pid, address, region.size) == []
        assert await reason_of(one.driver.attach_pager(one.seat)) is Reason.ILLEGAL_STATE

        uffd = Userfaultfd(os.dup(memory.uffd))
        for address, region in zip(memory.addresses, layout.regions, strict=True):
            uffd.unregister(address, region.size)
        os.close(uffd.fileno())
        async with house(*backend, "-S") as source:
            await source.driver.describe()
            await source.driver.pause()
            await one.driver.load_state((await source.driver.save_state()).state)
        await one.driver.detach_pager()
        assert (one.userfaultfds(), one.guarded()) == ([], 0)
        assert one.descriptors() <= before


async def test_a_driver_that_leaves_an_attached_qemu_leaves_it_waiting() -> None:
    async with house(incoming=True) as one:
        await one.driver.describe()
        await one.driver.attach_pager(one.seat)
        await one.driver.close()
        assert (await one.driver.describe()).activity is Activity.INCOMING
        await one.driver.kill()
        assert await asyncio.to_thread(one.process.wait, SECONDS) == 0


async def test_a_loaded_guest_runs_by_word_of_this_driver_alone() -> None:
    async with house("-S") as source, house(incoming=True) as one:
        for driver in (source.driver, one.driver):
            await driver.describe()
        await source.driver.pause()
        await one.driver.load_state((await source.driver.save_state()).state)
        assert (await one.driver.describe()).activity is Activity.PAUSED
        await one.driver.resume()
        assert (await one.driver.describe()).activity is Activity.RUNNING
        assert await reason_of(one.driver.save_state()) is Reason.ILLEGAL_STATE
        assert await reason_of(one.driver.attach_pager(one.seat)) is Reason.ILLEGAL_STATE


async def test_an_attach_that_fails_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(incoming=True) as one:
        await one.driver.describe()
        register, done = Userfaultfd.register, []

        def second_fails(uffd: Userfaultfd, address: int, length: int) -> int:
            done.append(address)
            if len(done) == 2:
                raise FerryError(Reason.USERFAULTFD_REFUSED, "as the test says")
            return register(uffd, address, length)

        monkeypatch.setattr(Userfaultfd, "register", second_fails)
        assert await reason_of(one.driver.attach_pager(one.seat)) is Reason.USERFAULTFD_REFUSED
        assert (one.userfaultfds(), one.guarded(), one.seat.taken) == ([], 0, [])
        monkeypatch.undo()
        await one.driver.attach_pager(one.seat)
        assert len(one.seat.taken) == 1


async def test_a_running_qemu_takes_no_guest_in() -> None:
    async with house() as one:
        assert await reason_of(one.driver.attach_pager(one.seat)) is Reason.ILLEGAL_STATE
        assert await reason_of(one.driver.load_state(pack(Package(b"", {})))) is Reason.ILLEGAL_STATE
        assert (await one.driver.describe()).activity is Activity.RUNNING


async def test_a_waiting_qemu_is_neither_stopped_nor_run_nor_saved() -> None:
    async with house(incoming=True) as one:
        for call in (one.driver.pause, one.driver.resume, one.driver.save_state):
            assert await reason_of(call()) is Reason.ILLEGAL_STATE
        assert (await one.driver.describe()).activity is Activity.INCOMING


async def test_ram_that_is_a_private_view_of_a_file_cannot_be_filled(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=m,size=32M,mem-path={ram},share=off"
    async with house("-object", backend, "-machine", "pc,memory-backend=m", incoming=True) as one:
        await one.driver.describe()
        with pytest.raises(FerryError, match="share=on") as refused:
            await one.driver.attach_pager(one.seat)
        assert refused.value.reason is Reason.VMM_MISMATCH
        assert one.userfaultfds() == []


@pytest.mark.parametrize("state", [b"", b"nonsense", pack(Package(b"no state", {}))])
async def test_what_is_no_state_is_refused_and_qemu_waits_on(state: bytes) -> None:
    async with house(incoming=True) as one:
        await one.driver.describe()
        assert await reason_of(one.driver.load_state(state)) is Reason.VMM_FAILED
        assert (await one.driver.describe()).activity is Activity.INCOMING


@pytest.mark.parametrize("hangs", [False, True], ids=["at once", "although it hangs"])
async def test_kill_ends_it(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr("pageferryd.vmm.qemu.driver._EXIT_SECONDS", 0.5)
    async with house() as one:
        await one.driver.describe()
        if hangs:
            one.process.send_signal(signal.SIGSTOP)
        await one.driver.kill()
        await asyncio.to_thread(one.process.wait, SECONDS)
        await one.driver.kill()
        assert await reason_of(one.driver.describe()) is Reason.VMM_UNREACHABLE
