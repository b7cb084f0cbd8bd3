"""The Cloud Hypervisor driver, with a stand-in that keeps to its protocol."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from cloud_hypervisor_house import DEADLINE, MIB, SMALL, Host, descriptors, refused, take

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.vmm.cloud_hypervisor import driver as driver_module
from pageferryd.vmm.cloud_hypervisor import guard, protocol
from pageferryd.vmm.cloud_hypervisor.driver import CloudHypervisorDriver
from pageferryd.vmm.cloud_hypervisor.saved_guest import SavedGuest, for_receiver
from pageferryd.vmm.driver import Activity, Memory

NOBODY = 65534

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    with tempfile.TemporaryDirectory(prefix="ch-") as directory:
        made = Host(Path(directory))
        yield made
        await made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STEP_SECONDS", 0.3)
    monkeypatch.setattr(driver_module, "_EXIT_SECONDS", 1.0)


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
async def test_a_guest_crosses_and_is_whole(host: Host, options: tuple[str, ...]) -> None:
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

    seat = host.seat_for(memory, destination)
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


def shared_memory(directory: Path, general: str, **sizes: str) -> Path:
    """Write how shared memory gets huge pages, as the kernel shows it."""
    (directory / "shmem_enabled").write_text(f"always within_size advise [{general}] deny\n")
    for size, chosen in sizes.items():
        (directory / f"hugepages-{size}").mkdir()
        (directory / f"hugepages-{size}" / "shmem_enabled").write_text(f"always inherit [{chosen}] never\n")
    return directory


@pytest.mark.parametrize("general", ["never", "advise"])
async def test_a_release_that_only_wakes_crosses_where_memory_has_small_pages(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, general: str
) -> None:
    monkeypatch.setattr(guard, "_HUGE", shared_memory(tmp_path, general, s2048kB="inherit", s64kB="never"))
    _, leaving = await host.running()
    destination, coming = await host.incoming("--behave", "wakes")
    saved, memory = await take(leaving)
    await coming.attach_pager(host.seat_for(memory, destination))
    await coming.load_state(saved.state)
    await coming.resume()
    await destination.runs_on()
    await destination.is_intact()


HUGE = [("always", {}), ("force", {}), ("within_size", {"s2048kB": "inherit"}), ("never", {"s64kB": "always"})]


@pytest.mark.parametrize(("general", "sizes"), HUGE)
async def test_a_release_that_only_wakes_is_refused_where_memory_may_have_huge_pages(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, general: str, sizes: dict[str, str]
) -> None:
    monkeypatch.setattr(guard, "_HUGE", shared_memory(tmp_path, general, **sizes))
    source, leaving = await host.running()
    destination, coming = await host.incoming("--behave", "wakes")
    saved, memory = await take(leaving)
    await coming.attach_pager(host.seat_for(memory, destination))
    error = await refused(coming.load_state(saved.state), Reason.VMM_FAILED)
    assert "minor faults" in error.message
    await coming.kill()
    await leaving.resume()
    await source.runs_on()


async def test_vmms_of_another_user_reach_the_sidecars_sockets(host: Host) -> None:
    host.directory.chmod(0o711)
    os.chown(host.directory, NOBODY, NOBODY)
    source, leaving = await host.running("--uid", str(NOBODY))
    destination, coming = await host.incoming("--uid", str(NOBODY))
    saved, memory = await take(leaving)
    seat = host.seat_for(memory, destination)
    await coming.attach_pager(seat)
    await coming.load_state(saved.state)
    await coming.resume()
    await destination.is_intact()
    assert seat.failures == []
    await leaving.kill()
    assert await source.exit_code() == 0


async def test_restoring_the_devices_may_touch_memory_before_the_guest_runs(host: Host) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming()
    saved, memory = await take(leaving)
    seat = host.seat_for(memory, destination)
    await coming.attach_pager(seat)
    await coming.load_state(saved.state)
    assert {0, 3 * MIB // PAGE_SIZE} <= set(seat.faulted)


async def test_whoever_resumes_again_is_told_that_the_guest_runs(host: Host) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming()
    saved, memory = await take(leaving)
    await coming.attach_pager(host.seat_for(memory, destination))
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


async def test_the_memory_stays_readable_when_the_vmm_is_gone(host: Host) -> None:
    source, leaving = await host.running()
    destination, coming = await host.incoming()
    await source.runs_on()
    saved, memory = await take(leaving)
    await source.kill()
    await coming.attach_pager(host.seat_for(memory, destination))
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


async def test_a_state_of_another_guest_or_none_is_refused(host: Host) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming()
    saved, memory = await take(leaving)
    await refused(coming.load_state(saved.state), Reason.ILLEGAL_STATE)

    other = Memory(Layout([Region(0, MIB)]), memory.locations[:1], memory.holder)
    seat = host.seat_for(other, destination)
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
