"""The Cloud Hypervisor driver, with stand-ins that do not keep to the protocol, fall silent, or die."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cloud_hypervisor_house import DEADLINE, SMALL, Host, descriptors, refused, take

from pageferry.errors import FerryError, Reason
from pageferryd.vmm import http_api
from pageferryd.vmm.cloud_hypervisor import driver as driver_module
from pageferryd.vmm.cloud_hypervisor import protocol

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
async def test_a_vmm_that_does_not_take_a_guest_is_reported_and_ended(host: Host, behave: str, words: str) -> None:
    source, leaving = await host.running()
    destination, coming = await host.incoming("--behave", behave)
    saved, memory = await take(leaving)
    seat = host.seat_for(memory, destination)
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
async def test_a_vmm_that_does_not_let_its_guest_run_is_reported_each_time(host: Host, behave: str) -> None:
    _, leaving = await host.running()
    destination, coming = await host.incoming("--behave", behave)
    saved, memory = await take(leaving)
    await coming.attach_pager(host.seat_for(memory, destination))
    await coming.load_state(saved.state)
    for _ in range(2):
        await refused(coming.resume(), Reason.VMM_FAILED)
    await asyncio.wait_for(coming.kill(), DEADLINE)
    await destination.exit_code()
