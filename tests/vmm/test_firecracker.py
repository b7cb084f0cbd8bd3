"""The driver for Firecracker, with a stand-in as a process of its own: well-behaved, and not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from driver_conformance import CALLS, DriverConformance, Seat, activity, reason_of
from firecracker_house import DEADLINE, MIB, FirecrackerHouse

from pageferry.errors import FerryError, Reason
from pageferryd.linux.unix_peer import recv_with_fds
from pageferryd.vmm.driver import Activity
from pageferryd.vmm.firecracker import api, driver, state_file
from pageferryd.vmm.firecracker.driver import FirecrackerDriver

GIB = 1 << 30


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[FirecrackerHouse]:
    house = await FirecrackerHouse.start(tmp_path / "v", 16)
    yield house
    await house.stop()


@pytest.fixture
async def incoming(tmp_path: Path) -> AsyncIterator[FirecrackerHouse]:
    house = await FirecrackerHouse.start(tmp_path / "v", 0)
    yield house
    await house.stop()


Start = Callable[..., Awaitable[FirecrackerHouse]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start stand-ins with options; mib=0 waits for a guest."""
    started: list[FirecrackerHouse] = []

    async def make(*options: str, mib: int = 16) -> FirecrackerHouse:
        house = await FirecrackerHouse.start(tmp_path / f"v{len(started)}", mib, *options)
        started.append(house)
        return house

    yield make
    for house in started:
        await house.stop()


async def refusal_of(call: Awaitable[object]) -> FerryError:
    with pytest.raises(FerryError) as refused:
        await asyncio.wait_for(call, DEADLINE)
    return refused.value


def nothing_is_left(house: FirecrackerHouse) -> bool:
    return not house.runtime_dir.exists() or not list(house.runtime_dir.iterdir())


class TestFirecrackerDriver(DriverConformance):
    """Passes what every driver must, but that memory comes with the state and nothing has to be detached."""

    async def test_an_incoming_vmm_tells_its_memory_and_nowhere_to_read_it(self, incoming: FirecrackerHouse) -> None:
        description = await incoming.driver.describe()
        assert description.activity is Activity.INCOMING
        assert description.pid == incoming.pid
        assert description.layout is None
        assert description.memory is None
        assert description.machine == "Firecracker 1.16"

    @pytest.mark.userfaultfd
    async def test_an_incoming_vmm_hands_its_memory_over_once(self, incoming: FirecrackerHouse, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(tmp_path / "p"))
            listener.listen(1)
            await incoming.driver.attach_pager(Seat(tmp_path / "p"))
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert await activity(incoming.driver) is Activity.INCOMING

    async def test_a_pager_that_is_not_there_is_an_error_of_the_vmm(
        self, incoming: FirecrackerHouse, start: Start, tmp_path: Path
    ) -> None:
        running = await start()
        await running.driver.describe()
        await running.driver.pause()
        saved = await running.driver.save_state()
        await incoming.driver.attach_pager(Seat(tmp_path / "nobody"))
        assert await reason_of(incoming.driver.load_state(saved.state)) is Reason.VMM_FAILED

    async def test_a_vmm_that_has_ended_cannot_be_reached(self, running: FirecrackerHouse) -> None:
        await running.driver.describe()
        await running.end()
        for name, call in CALLS.items():
            if name != "detach_pager":
                assert await reason_of(call(running.driver)) is Reason.VMM_UNREACHABLE, name
        await running.driver.kill()


# Where the memory lies


def bytes_at(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as content:
        return os.pread(content.fileno(), 8, address)


@pytest.mark.parametrize("options", [(), ("--guarded",)])
async def test_memory_on_both_sides_of_the_hole_is_found(start: Start, options: tuple[str, ...]) -> None:
    house = await start(*options, mib=3072 + 17)
    description = await house.driver.describe()
    assert description.obstacles == []
    assert description.layout is not None
    assert [(one.guest_address, one.size) for one in description.layout.regions] == [
        (0, 3 * GIB),
        (4 * GIB, 17 * MIB),
    ]
    assert description.memory is not None
    low, high = [one.process.address for one in description.memory.locations]
    assert bytes_at(house.pid, low + 0xE0000) == b"RSD PTR "
    assert bytes_at(house.pid, high) == b"ferrypg1"


async def test_memory_that_is_not_found_is_an_obstacle_and_no_guess(start: Start) -> None:
    house = await start("--behave", "size-lies")
    description = await house.driver.describe()
    assert description.layout is None
    assert description.memory is None
    assert description.memory_bytes == 17 * MIB
    (obstacle,) = description.obstacles
    assert "17 MiB of guest memory are found nowhere" in obstacle


# Devices and machine


async def test_what_firecracker_cannot_snapshot_is_an_obstacle(start: Start) -> None:
    config = {
        "drives": [{"drive_id": "rootfs", "socket": "/run/vhost.sock"}, {"drive_id": "data", "socket": None}],
        "memory-hotplug": {"total_size_mib": 1024},
    }
    house = await start("--config", json.dumps(config))
    vhost, hotplug = (await house.driver.describe()).obstacles
    assert "'rootfs' is vhost-user" in vhost
    assert "hotpluggable memory" in hotplug


@pytest.mark.parametrize(
    ("release", "name"),
    [("1.13.1", "Firecracker 1.13"), ("1.14.0-dev", "Firecracker 1.14"), ("v1.9.0", "Firecracker 1.9")],
)
async def test_releases_name_the_machine(start: Start, release: str, name: str) -> None:
    house = await start("--release", release)
    assert (await house.driver.describe()).machine == name


# The state


async def test_the_state_is_taken_without_a_memory_file(
    running: FirecrackerHouse, capfd: pytest.CaptureFixture[str]
) -> None:
    await running.driver.describe()
    await running.driver.pause()
    saved = await running.driver.save_state()
    assert state_file.is_complete(saved.state)
    assert saved.memory is None
    assert nothing_is_left(running)
    await running.driver.resume()
    assert (await running.ask("verify", "verified"))["bad"] == 0


@pytest.mark.parametrize("behave", ["memory-first", "state-torn"])
@pytest.mark.parametrize("tracks", [True, False])
async def test_a_state_that_is_not_complete_for_certain_costs_a_whole_snapshot(
    start: Start, behave: str, tracks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    create = api.FirecrackerApi.create_snapshot

    async def noted(self: api.FirecrackerApi, state_path: str, memory_path: str, kind: str) -> None:
        kinds.append(kind)
        await create(self, state_path, memory_path, kind)

    monkeypatch.setattr(api.FirecrackerApi, "create_snapshot", noted)
    house = await start("--behave", behave, *(["--track-dirty-pages"] if tracks else []))
    await house.driver.describe()
    await house.driver.pause()
    assert state_file.is_complete((await house.driver.save_state()).state)
    assert kinds == ["Full", "Diff" if tracks else "Full"]
    assert nothing_is_left(house)


@pytest.mark.parametrize("behave", ["create-refuses", "state-none", "state-huge", "state-link"])
async def test_a_state_that_does_not_come_leaves_the_guest_to_be_resumed(start: Start, behave: str) -> None:
    house = await start("--behave", behave)
    await house.driver.describe()
    await house.driver.pause()
    error = await refusal_of(house.driver.save_state())
    assert error.reason is Reason.VMM_FAILED
    assert nothing_is_left(house)
    await house.driver.resume()
    assert await activity(house.driver) is Activity.RUNNING


async def test_firecrackers_own_words_are_passed_on(start: Start) -> None:
    house = await start("--behave", "pause-refuses")
    error = await refusal_of(house.driver.pause())
    assert error.reason is Reason.VMM_FAILED
    assert "This is a bad day to pause." in error.message


@pytest.mark.parametrize("step", ["pause", "create", "resume"])
async def test_a_firecracker_that_dies_or_is_silent_is_out_of_reach(
    start: Start, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "STATE_SECONDS", 0.2)
    for how in ("dies", "silent"):
        house = await start("--behave", f"{step}-{how}")
        await house.driver.describe()
        if step != "pause":
            await house.driver.pause()
        call = {"pause": house.driver.pause, "create": house.driver.save_state, "resume": house.driver.resume}[step]
        assert await reason_of(call()) is Reason.VMM_UNREACHABLE, how
        assert nothing_is_left(house)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        ("instance-odd", Reason.VMM_FAILED),
        ("api-no-json", Reason.VMM_FAILED),
        ("api-no-object", Reason.VMM_FAILED),
        ("api-no-http", Reason.VMM_FAILED),
        ("api-gigabyte", Reason.VMM_FAILED),
        ("api-hangs-up", Reason.VMM_UNREACHABLE),
    ],
)
async def test_answers_that_no_firecracker_gives_are_refused(start: Start, behave: str, reason: Reason) -> None:
    house = await start("--behave", behave)
    error = await refusal_of(house.driver.describe())
    assert error.reason is reason
    assert len(error.message) < 1000


# Loading


@pytest.mark.root
@pytest.mark.userfaultfd
async def test_loading_a_state_hands_the_memory_over_in_one_message(
    running: FirecrackerHouse, start: Start, tmp_path: Path
) -> None:
    await running.driver.describe()
    await running.driver.pause()
    saved = await running.driver.save_state()
    waiting = await start(mib=0)
    await waiting.driver.describe()
    path = tmp_path / "p"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
        await waiting.driver.attach_pager(Seat(path))
        loading = asyncio.create_task(waiting.driver.load_state(saved.state))
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.settimeout(DEADLINE)
        received = recv_with_fds(connection, 65536, 3)
    (entry,) = json.loads(received.data)
    assert (entry["size"], entry["offset"], entry["page_size"]) == (16 * MIB, 0, 4096)
    assert os.readlink(f"/proc/self/fd/{received.fds[0]}") == "anon_inode:[userfaultfd]"  # noqa: PTH115
    # It looks at its memory, which nobody fills here.
    await waiting.driver.kill()
    assert (await refusal_of(loading)).reason is Reason.VMM_UNREACHABLE
    assert not (tmp_path / "vmstate").exists()
    connection.close()
    for fd in received.fds:
        os.close(fd)


async def test_a_state_that_is_none_is_refused_by_firecracker(incoming: FirecrackerHouse, tmp_path: Path) -> None:
    await incoming.driver.attach_pager(Seat(tmp_path / "p"))
    error = await refusal_of(incoming.driver.load_state(b"no state"))
    assert error.reason is Reason.VMM_FAILED
    assert "CRC64" in error.message
    assert not (tmp_path / "vmstate").exists()


async def test_a_state_without_a_pager_is_not_loaded(incoming: FirecrackerHouse) -> None:
    assert await reason_of(incoming.driver.load_state(b"state")) is Reason.ILLEGAL_STATE


# The end


async def test_a_process_that_does_not_hear_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_TERM_SECONDS", 0.05)
    house = await FirecrackerHouse.start(tmp_path / "v", 0)
    await house.driver.describe()
    # Like the first process of a pid namespace, a stopped one does not hear SIGTERM.
    os.kill(house.pid, signal.SIGSTOP)
    await house.driver.kill()
    await asyncio.wait_for(house.ended(), DEADLINE)
    await house.stop()


async def test_a_driver_that_knows_no_process_kills_none(running: FirecrackerHouse) -> None:
    another = running.another_driver()
    await another.kill()
    await another.close()
    assert await activity(running.driver) is Activity.RUNNING


@pytest.mark.parametrize("path", ["relative", "", "/" + 120 * "x"])
async def test_a_path_that_no_socket_can_have_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(FerryError) as refused:
        FirecrackerDriver(path, tmp_path)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
