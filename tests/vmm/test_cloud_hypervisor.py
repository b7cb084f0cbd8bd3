"""The Cloud Hypervisor driver, with a stand-in that keeps to its protocol, and with ones that do not."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cloud_hypervisor_child import CloudHypervisor
from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.door import DoorEvents, Settled
from pageferryd.destination.given_files import GivenMemory
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm import http_api
from pageferryd.vmm.cloud_hypervisor import driver as driver_module
from pageferryd.vmm.cloud_hypervisor import protocol
from pageferryd.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from pageferryd.vmm.cloud_hypervisor.saved_guest import SavedGuest, for_receiver
from pageferryd.vmm.driver import Activity, FaultEndpoint, GivenFiles, GuardedMemory, Memory, Saved

DEADLINE = 10.0
MIB = 1 << 20
SMALL = ("--memory", "4")

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


class Host:
    """Makes VMMs and their drivers, and takes them down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime_dir = directory / "run"
        self._made: list[tuple[CloudHypervisor, CloudHypervisorDriver]] = []

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

    async def close(self) -> None:
        for vmm, driver in self._made:
            await driver.close()
            await vmm.close()
        # A refused call is kept by its error, with the connection of its frames.
        gc.collect()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ch-") as directory:
        yield Path(directory)


@pytest.fixture
async def host(short_dir: Path) -> AsyncIterator[Host]:
    made = Host(short_dir)
    yield made
    await made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STEP_SECONDS", 0.3)
    monkeypatch.setattr(driver_module, "_EXIT_SECONDS", 1.0)


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


SeatFor = Callable[[Memory, CloudHypervisor], Seat]


@pytest.fixture
async def seat_for(host: Host) -> AsyncIterator[SeatFor]:
    made: list[Seat] = []

    def make(source: Memory, vmm: CloudHypervisor) -> Seat:
        made.append(Seat(source, VmmDirectory.make(host.runtime_dir, f"m{len(made)}", vmm.pid)))
        return made[-1]

    yield make
    for seat in made:
        seat.close()


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


# What it is


async def test_a_running_vmm_tells_how_much_memory_its_guest_has(host: Host) -> None:
    vmm, driver = await host.vmm(*SMALL)
    description = await driver.describe()
    assert (description.activity, description.pid) == (Activity.RUNNING, vmm.pid)
    assert description.memory_bytes == 4 * MIB
    assert description.layout is None
    assert description.memory is None
    assert list(description.obstacles) == []


async def test_a_vmm_without_a_vm_waits_for_a_guest(host: Host) -> None:
    vmm, driver = await host.vmm("--incoming")
    description = await driver.describe()
    assert (description.activity, description.pid, description.layout) == (Activity.INCOMING, vmm.pid, None)


async def test_memory_that_is_not_shared_keeps_a_guest_where_it_is(host: Host) -> None:
    vmm, driver = await host.running("--unshared")
    assert any("shared=on" in obstacle for obstacle in (await driver.describe()).obstacles)
    await driver.pause()
    error = await refused(driver.save_state(), Reason.VMM_FAILED)
    assert "requires shared memory" in error.message
    await driver.resume()
    await vmm.runs_on()


async def test_pausing_twice_and_resuming_twice_is_harmless(host: Host) -> None:
    vmm, driver = await host.running()
    for _ in range(2):
        await driver.pause()
        assert (await driver.describe()).activity is Activity.PAUSED
    for _ in range(2):
        await driver.resume()
        assert (await driver.describe()).activity is Activity.RUNNING
    await vmm.runs_on()


# The crossing


@pytest.mark.parametrize("options", [(), ("--answers-late",), ("--behave", "says-memfds")], ids=["", "late", "newer"])
async def test_a_guest_crosses_and_is_whole(host: Host, seat_for: SeatFor, options: tuple[str, ...]) -> None:
    source, leaving = await host.running(*options)
    destination, coming = await host.incoming()
    await source.runs_on()
    before = descriptors()
    saved, memory = await take(leaving)
    assert memory.holder == os.getpid()
    assert [(region.guest_address, region.size) for region in memory.layout.regions] == [
        (0, 3 * MIB),
        (1 << 32, MIB),
    ]
    assert not (await leaving.private_pages()).ranges
    steps = (await source.status())["steps"]

    seat = seat_for(memory, destination)
    await coming.attach_pager(seat)
    await coming.load_state(saved.state)
    assert (await destination.status())["state"] == "paused"
    await coming.resume()
    assert seat.given is not None
    await asyncio.wait_for(seat.given.finished(), DEADLINE)
    await destination.runs_on()
    await leaving.kill()
    assert await source.exit_code() == 0
    await destination.is_intact()
    assert (await destination.status())["steps"] > steps
    assert set(seat.faulted) == set(range(memory.layout.page_count))
    assert seat.failures == []

    seat.close()
    for driver in (leaving, coming):
        await driver.close()
    gc.collect()
    assert descriptors() == before - Counter(anon_inode=2)
    assert list(host.runtime_dir.iterdir()) == []


async def test_restoring_the_devices_may_touch_memory_before_the_guest_runs(host: Host, seat_for: SeatFor) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming()
    saved, memory = await take(leaving)
    seat = seat_for(memory, destination)
    await coming.attach_pager(seat)
    await coming.load_state(saved.state)
    assert {0, 3 * MIB // PAGE_SIZE} <= set(seat.faulted)


async def test_whoever_resumes_again_is_told_that_the_guest_runs(host: Host, seat_for: SeatFor) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming()
    saved, memory = await take(leaving)
    await coming.attach_pager(seat_for(memory, destination))
    await coming.load_state(saved.state)
    first = asyncio.create_task(coming.resume())
    await asyncio.sleep(0)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    await coming.resume()
    await coming.resume()
    await destination.runs_on()


# The source keeps its guest


@pytest.mark.parametrize("options", [(), ("--answers-late",)], ids=["", "late"])
async def test_a_migration_that_is_taken_back_leaves_the_guest_where_it_was(
    host: Host, options: tuple[str, ...]
) -> None:
    vmm, driver = await host.running(*options)
    before = descriptors()
    for _ in range(2):
        await take(driver)
        assert (await vmm.status())["state"] == "paused"
        await driver.resume()
        await vmm.runs_on()
    await vmm.is_intact()
    assert descriptors() == before
    assert list(host.runtime_dir.iterdir()) == []


async def test_a_guest_stays_paused_when_its_sidecar_goes_away(host: Host) -> None:
    """Its destination may have it: only a sidecar that knows may let it run again."""
    vmm, driver = await host.running()
    await take(driver)
    await driver.close()
    other = CloudHypervisorDriver(vmm.socket_path, host.runtime_dir)
    assert (await other.describe()).activity is Activity.PAUSED
    assert (await vmm.status())["state"] == "paused"
    await other.resume()
    await vmm.runs_on()
    await other.close()


async def test_the_memory_stays_readable_when_the_vmm_is_gone(host: Host, seat_for: SeatFor) -> None:
    source, leaving = await host.running()
    destination, coming = await host.incoming()
    await source.runs_on()
    saved, memory = await take(leaving)
    await source.kill()
    await coming.attach_pager(seat_for(memory, destination))
    await coming.load_state(saved.state)
    await coming.resume()
    await destination.runs_on()
    await destination.is_intact()
    await leaving.kill()


async def test_a_vmm_that_was_resumed_by_somebody_else_is_not_taken(host: Host) -> None:
    vmm, driver = await host.running("--behave", "was-running")
    await driver.pause()
    error = await refused(driver.save_state(), Reason.VMM_FAILED)
    assert "resumed by somebody else" in error.message
    await driver.resume()
    await vmm.runs_on()


async def test_another_process_that_connects_is_not_taken_for_the_vmm(host: Host) -> None:
    vmm, driver = await host.running("--behave", "silent-connect")
    await driver.pause()
    saving = asyncio.create_task(driver.save_state())
    async with asyncio.timeout(DEADLINE):
        while not (found := list(host.runtime_dir.glob("*/peer.sock"))):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(found[0]))
        await refused(saving, Reason.HANDOFF_WRONG_PEER)
    await driver.resume()
    await vmm.runs_on()


# Bad sources

BAD_SOURCES = {
    "wrong-version": (Reason.PROTOCOL_MISMATCH, "version 7"),
    "wrong-order": (Reason.VMM_FAILED, "START was due"),
    "unknown-command": (Reason.VMM_FAILED, "77"),
    "abandon": (Reason.VMM_FAILED, "gave the migration up"),
    "slot-length": (Reason.VMM_FAILED, "12 bytes"),
    "no-fd": (Reason.VMM_FAILED, "one descriptor"),
    "two-fds": (Reason.VMM_FAILED, "one descriptor"),
    "not-a-memfd": (Reason.VMM_FAILED, "no memfd"),
    "small-memfd": (Reason.VMM_FAILED, "has 0 bytes"),
    "slot-missing": (Reason.VMM_FAILED, r"slots \[3\]"),
    "slot-twice": (Reason.VMM_FAILED, "twice"),
    "no-regions": (Reason.LAYOUT_INVALID, "memory slots"),
    "no-memory-manager": (Reason.VMM_FAILED, "no guest memory"),
    "overlapping-regions": (Reason.LAYOUT_INVALID, "overlap"),
    "odd-region": (Reason.LAYOUT_INVALID, "not whole pages"),
    "endless-region": (Reason.LAYOUT_INVALID, "pages are more"),
    "words-for-numbers": (Reason.LAYOUT_INVALID, "gpa"),
    "virtio-mem": (Reason.GUEST_NOT_MOVABLE, "virtio-mem"),
    "huge-config": (Reason.VMM_FAILED, "1073741824 bytes"),
    "not-json": (Reason.VMM_FAILED, "no guest memory"),
    "nested-json": (Reason.VMM_FAILED, "no guest memory"),
    "huge-state": (Reason.VMM_FAILED, "1073741824 bytes"),
    "empty-state": (Reason.VMM_FAILED, "empty state"),
    "send-500": (Reason.VMM_FAILED, "requires shared memory"),
}


@pytest.mark.parametrize("behave", BAD_SOURCES)
async def test_a_vmm_that_sends_its_guest_wrongly_keeps_it(host: Host, behave: str) -> None:
    vmm, driver = await host.running("--behave", behave)
    before = descriptors()
    reason, words = BAD_SOURCES[behave]
    await driver.pause()
    error = await refused(driver.save_state(), reason)
    with pytest.raises(FerryError, match=words):
        raise error
    await driver.resume()
    await vmm.runs_on()
    await vmm.is_intact()
    assert descriptors() == before
    assert list(host.runtime_dir.iterdir()) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "behave",
    [*(f"silent-{step}" for step in ("connect", "start", "slot", "config", "state", "complete")), "half-state"],
)
async def test_a_vmm_that_falls_silent_keeps_its_guest(host: Host, behave: str) -> None:
    vmm, driver = await host.running("--behave", behave)
    await driver.pause()
    error = await refused(driver.save_state(), Reason.VMM_FAILED)
    assert "within 0.3 s" in error.message
    await driver.resume()
    await vmm.runs_on()


@pytest.mark.parametrize("step", ["connect", "start", "slot", "config", "state", "complete"])
@pytest.mark.usefixtures("impatient")
async def test_a_vmm_that_dies_is_reported(host: Host, step: str) -> None:
    vmm, driver = await host.running("--behave", f"dies-{step}")
    before = descriptors()
    await driver.pause()
    await refused(driver.save_state(), Reason.VMM_FAILED, Reason.VMM_UNREACHABLE)
    await refused(driver.resume(), Reason.VMM_UNREACHABLE)
    assert await vmm.exit_code() == 1
    await driver.kill()
    assert descriptors() == before
    assert list(host.runtime_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        ("info-500", Reason.VMM_FAILED),
        ("info-nonsense", Reason.VMM_FAILED),
        ("info-list", Reason.VMM_FAILED),
        ("info-empty", Reason.VMM_FAILED),
        ("info-endless", Reason.VMM_FAILED),
        ("info-hangs", Reason.VMM_UNREACHABLE),
        ("info-dies", Reason.VMM_UNREACHABLE),
    ],
)
async def test_an_api_that_tells_nonsense_is_an_error(
    host: Host, monkeypatch: pytest.MonkeyPatch, behave: str, reason: Reason
) -> None:
    monkeypatch.setattr(http_api.UnixHttp.call, "__defaults__", (None, 0.3))
    _, driver = await host.vmm(*SMALL, "--behave", behave)
    error = await refused(driver.describe(), reason)
    assert len(error.message) < 1000


async def test_a_guest_that_cannot_be_paused_runs_on(host: Host) -> None:
    vmm, driver = await host.running("--behave", "pause-500")
    error = await refused(driver.pause(), Reason.VMM_FAILED)
    assert "a vCPU does not stop" in error.message
    await driver.resume()
    await vmm.runs_on()


# Bad destinations


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        ("receive-500", "Error binding"),
        ("refuses-start", "start is not wanted|refused START"),
        ("refuses-slot", "slot is not wanted|refused MEMORY_FD"),
        ("refuses-config", "config is not wanted|refused CONFIG"),
        ("refuses-state", "state is not wanted|refused STATE"),
        ("dies-at-start", "hung up"),
        ("dies-at-slot", "hung up"),
        ("dies-at-config", "hung up"),
        ("dies-at-state", "hung up"),
        ("ignores-postcopy", "without a userfaultfd"),
        ("never-listens", "within 0.3 s"),
        ("silent-at-start", "within 0.3 s"),
        ("silent-at-slot", "within 0.3 s"),
        ("silent-at-config", "within 0.3 s"),
        ("silent-at-state", "within 0.3 s"),
    ],
)
@pytest.mark.usefixtures("impatient")
async def test_a_vmm_that_does_not_take_a_guest_is_reported_and_ended(
    host: Host, seat_for: SeatFor, behave: str, words: str
) -> None:
    source, leaving = await host.running()
    destination, coming = await host.incoming("--behave", behave)
    saved, memory = await take(leaving)
    seat = seat_for(memory, destination)
    await coming.attach_pager(seat)
    error = await refused(coming.load_state(saved.state), Reason.VMM_FAILED, Reason.VMM_UNREACHABLE)
    if "dies" not in behave:
        with pytest.raises(FerryError, match=words):
            raise error
    await asyncio.wait_for(coming.kill(), DEADLINE)
    await destination.exit_code()
    await leaving.resume()
    await source.runs_on()
    await source.is_intact()


@pytest.mark.parametrize("behave", ["refuses-complete", "dies-at-complete", "silent-at-complete"])
@pytest.mark.usefixtures("impatient")
async def test_a_vmm_that_does_not_let_its_guest_run_is_reported_each_time(
    host: Host, seat_for: SeatFor, behave: str
) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming("--behave", behave)
    saved, memory = await take(leaving)
    await coming.attach_pager(seat_for(memory, destination))
    await coming.load_state(saved.state)
    for _ in range(2):
        await refused(coming.resume(), Reason.VMM_FAILED)
    await asyncio.wait_for(coming.kill(), DEADLINE)
    await destination.exit_code()


async def test_a_state_of_another_guest_or_none_is_refused(host: Host, seat_for: SeatFor) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming()
    saved, memory = await take(leaving)
    await refused(coming.load_state(saved.state), Reason.ILLEGAL_STATE)

    other = Memory(Layout([Region(0, MIB)]), memory.locations[:1], memory.holder)
    seat = seat_for(other, destination)
    await coming.attach_pager(seat)
    await refused(coming.load_state(saved.state), Reason.LAYOUT_MISMATCH)
    for state, reason in (
        (b"", Reason.INVALID_ARGUMENT),
        (b"something else entirely", Reason.INVALID_ARGUMENT),
        (saved.state[:100], Reason.INVALID_ARGUMENT),
        (saved.state[:8] + b"\7" + saved.state[9:], Reason.PROTOCOL_MISMATCH),
    ):
        await coming.attach_pager(seat)
        await refused(coming.load_state(state), reason)
    assert (await coming.describe()).activity is Activity.INCOMING


# The end


async def test_a_vmm_is_ended_by_its_api(host: Host) -> None:
    vmm, driver = await host.running()
    await driver.kill()
    assert await vmm.exit_code() == 0
    await driver.kill()


@pytest.mark.usefixtures("impatient")
async def test_a_vmm_that_does_not_end_when_it_is_asked_to_is_killed(host: Host) -> None:
    vmm, driver = await host.running("--behave", "shutdown-500")
    await driver.kill()
    assert await vmm.exit_code() == -9


async def test_nobody_can_be_reached_where_nobody_listens(host: Host) -> None:
    vmm, driver = await host.running()
    await vmm.kill()
    await refused(driver.describe(), Reason.VMM_UNREACHABLE)
    await refused(driver.pause(), Reason.VMM_UNREACHABLE)
    await refused(driver.resume(), Reason.VMM_UNREACHABLE)
    await driver.kill()


@pytest.mark.parametrize("path", ["relative", "", "/" + 120 * "x"])
def test_a_path_that_no_socket_can_have_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(FerryError) as error:
        CloudHypervisorDriver(path, tmp_path)
    assert error.value.reason is Reason.INVALID_ARGUMENT


# What crosses


def test_a_config_goes_on_byte_for_byte_but_for_the_way_of_the_memory() -> None:
    assert for_receiver(b' {"a": 1.50,"b":[]}') == b'{"memory_mode":"Postcopy","a": 1.50,"b":[]}'
    assert for_receiver(b'{"a":1,"memory_mode":"MemFDs"}') == b'{"a": 1, "memory_mode": "Postcopy"}'


def test_a_state_that_does_not_fit_into_one_message_is_refused() -> None:
    with pytest.raises(FerryError) as error:
        SavedGuest(0, bytes(16 * MIB), bytes(64 * MIB), []).pack()
    assert error.value.reason is Reason.VMM_FAILED
