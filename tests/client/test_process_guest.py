"""The process guest as a real process: it proves its own memory, and crosses into another process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from guest_process import GuestProcess
from tiny_pager import TinyPager

from pageferry.errors import Reason, from_rpc
from pageferry.v1 import vmm_pb2

PAGE = 4096
MEMORY = "4M"
PAGES = 1024


@pytest.fixture
async def guest(short_path: Path) -> AsyncIterator[GuestProcess]:
    async with GuestProcess(short_path / "a.sock", "--memory", MEMORY, "--seed", "7") as running:
        yield running


async def memory_address(guest: GuestProcess) -> int:
    described = await guest.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())
    return described.locations[0].process.address


def page_reader(pid: int, address: int) -> Callable[[int], bytes]:
    """Return a function that reads the page at an offset out of another process's memory."""

    def read(offset: int) -> bytes:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address + offset)
            return memory.read(PAGE)

    return read


def overwrite(pid: int, address: int, data: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(data)


async def test_a_guest_runs_and_finds_its_memory_whole(guest: GuestProcess) -> None:
    await guest.steps_beyond(3 * PAGES)

    verified = await guest.verify()

    assert verified == {"event": "verified", "pages": PAGES, "bad": 0, "first_bad": []}
    assert (await guest.status())["errors"] == 0


@pytest.mark.parametrize("order", ["random", "sequential", "local"])
@pytest.mark.parametrize("backing", ["anonymous", "shmem"])
async def test_a_guest_proves_its_memory_in_every_order_and_on_every_backing(
    short_path: Path, order: str, backing: str
) -> None:
    options = ("--memory", "1M", "--order", order, "--backing", backing, "--working-set", "0.6")
    async with GuestProcess(short_path / "a.sock", *options) as guest:
        # Far enough for the holes, too, to be written: they stay holes for 64 passes.
        await guest.steps_beyond(66 * 256)

        assert (await guest.verify())["bad"] == 0


async def test_holes_read_as_zeroes_until_the_guest_reaches_them_late(short_path: Path) -> None:
    async with GuestProcess(short_path / "a.sock", "--memory", "64M", "--sparse", "0.5") as guest:
        read = page_reader(guest.pid, await memory_address(guest))
        await guest.vmm.Pause(vmm_pb2.PauseRequest())

        assert all(read(number * PAGE) == bytes(PAGE) for number in range(32, 64))
        assert all(read(number * PAGE) != bytes(PAGE) for number in range(32))
        assert (await guest.verify())["bad"] == 0


async def test_a_paused_guest_stands_still_even_after_it_was_verified(guest: GuestProcess) -> None:
    await guest.steps_beyond(0)
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    first = await guest.status()

    await guest.verify()
    second = await guest.status()

    assert first["state"] == second["state"] == "paused"
    assert first["steps"] == second["steps"]

    await guest.vmm.Resume(vmm_pb2.ResumeRequest())
    await guest.steps_beyond(first["steps"])


@pytest.mark.root
async def test_a_running_guest_reports_a_page_that_was_changed_behind_its_back(guest: GuestProcess) -> None:
    address = await memory_address(guest)
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    overwrite(guest.pid, address + 5 * PAGE + 4000, b"\xff")
    await guest.vmm.Resume(vmm_pb2.ResumeRequest())

    found = await guest.event("error")

    assert found["message"].startswith("page 5: expected version ")
    assert found["message"].endswith(", damaged")
    assert (await guest.event("progress", errors=1))["state"] == "running"
    # The guest went on, and wrote the page anew.
    assert (await guest.verify())["bad"] == 0


@pytest.mark.root
async def test_a_verification_finds_zero_foreign_and_stale_pages(guest: GuestProcess) -> None:
    await guest.steps_beyond(PAGES)
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    address = await memory_address(guest)
    read = page_reader(guest.pid, address)
    stale = read(3 * PAGE)
    await guest.vmm.Resume(vmm_pb2.ResumeRequest())
    await guest.steps_beyond((await guest.status())["steps"] + 2 * PAGES)
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    overwrite(guest.pid, address + 1 * PAGE, bytes(PAGE))
    overwrite(guest.pid, address + 2 * PAGE, read(9 * PAGE))
    overwrite(guest.pid, address + 3 * PAGE, stale)
    overwrite(guest.pid, address + 4 * PAGE, b"\x01" * PAGE)

    verified = await guest.verify()

    assert verified["bad"] == 4
    zero, foreign, old, nonsense = verified["first_bad"]
    assert zero.startswith("page 1: ")
    assert zero.endswith("found zeroes")
    assert foreign.endswith("of page 9")
    assert old.startswith("page 3: ")
    assert old.endswith("of page 3")
    assert "bytes that no guest wrote" in nonsense


@pytest.mark.root
@pytest.mark.userfaultfd
@pytest.mark.parametrize("backing", ["anonymous", "shmem"])
async def test_a_guest_crosses_into_an_incoming_one_page_by_page(
    guest: GuestProcess, short_path: Path, tiny_pager: TinyPager, backing: str
) -> None:
    incoming = GuestProcess(short_path / "b.sock", "--memory", MEMORY, "--incoming", "--backing", backing)
    async with incoming as target:
        await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=tiny_pager.path))
        await guest.steps_beyond(2 * PAGES)
        await guest.vmm.Pause(vmm_pb2.PauseRequest())
        saved = await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())
        crossed_at = (await guest.status())["steps"]
        tiny_pager.serve(page_reader(guest.pid, await memory_address(guest)))

        await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=saved.state))
        await target.vmm.Resume(vmm_pb2.ResumeRequest())
        await target.steps_beyond(crossed_at + PAGES)
        await asyncio.to_thread(tiny_pager.finish)
        await target.vmm.DetachPager(vmm_pb2.DetachPagerRequest())

        assert tiny_pager.faults > 0
        verified = await target.verify()
        assert (verified["pages"], verified["bad"]) == (PAGES, 0)
        status = await target.status()
        assert status["errors"] == 0
        assert status["longest_stall_ms"] > 0


@pytest.mark.root
@pytest.mark.userfaultfd
async def test_a_guest_that_waits_for_a_page_still_answers_and_its_pause_waits(
    guest: GuestProcess, short_path: Path, tiny_pager: TinyPager
) -> None:
    async with GuestProcess(short_path / "b.sock", "--memory", MEMORY, "--incoming") as target:
        await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=tiny_pager.path))
        await guest.vmm.Pause(vmm_pb2.PauseRequest())
        saved = await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())
        await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=saved.state))
        await target.vmm.Resume(vmm_pb2.ResumeRequest())
        await target.in_a_fault()
        pausing = asyncio.ensure_future(target.vmm.Pause(vmm_pb2.PauseRequest()))

        # No page comes: the worker is in its first fault, the event loop is not.
        described = await target.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())
        assert described.state == vmm_pb2.VMM_STATE_RUNNING
        assert (await target.status())["state"] == "running"
        assert not pausing.done()

        tiny_pager.serve(page_reader(guest.pid, await memory_address(guest)))
        await pausing
        assert (await target.status())["state"] == "paused"


@pytest.mark.root
@pytest.mark.userfaultfd
@pytest.mark.parametrize("ending", ["quit", "kill", "sigterm"])
async def test_a_guest_that_waits_for_a_page_that_never_comes_can_be_ended(
    guest: GuestProcess, short_path: Path, tiny_pager: TinyPager, ending: str
) -> None:
    async with GuestProcess(short_path / "b.sock", "--memory", MEMORY, "--incoming") as target:
        await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=tiny_pager.path))
        await guest.vmm.Pause(vmm_pb2.PauseRequest())
        saved = await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())
        await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=saved.state))
        await target.vmm.Resume(vmm_pb2.ResumeRequest())
        await target.in_a_fault()
        # A verification waits, too, in a thread of its own.
        await target.say("verify")
        await target.status()

        match ending:
            case "quit":
                await target.say("quit")
            case "kill":
                await target.vmm.Kill(vmm_pb2.KillRequest())
            case "sigterm":
                os.kill(target.pid, signal.SIGTERM)

        assert await target.exit_code() == 0
        assert [left.name for left in short_path.glob("b*")] == []  # noqa: ASYNC240


@pytest.mark.root
@pytest.mark.userfaultfd
@pytest.mark.parametrize(
    ("options", "damage", "reason"),
    [
        (("--memory", "2M"), lambda state: state, Reason.LAYOUT_MISMATCH),
        (("--memory", MEMORY), lambda _: b"", Reason.INVALID_ARGUMENT),
        (("--memory", MEMORY), lambda state: state[:-1], Reason.INVALID_ARGUMENT),
        (("--memory", MEMORY), lambda state: b"x" + state[1:], Reason.INVALID_ARGUMENT),
    ],
    ids=["of a guest of another size", "empty", "cut short", "of another kind"],
)
async def test_an_incoming_guest_refuses_a_state(
    guest: GuestProcess,
    short_path: Path,
    tiny_pager: TinyPager,
    options: tuple[str, ...],
    damage: Callable[[bytes], bytes],
    reason: Reason,
) -> None:
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    state = (await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())).state
    async with GuestProcess(short_path / "b.sock", "--incoming", *options) as target:
        await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=tiny_pager.path))

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=damage(state)))

        assert from_rpc(refused.value, Reason.INTERNAL).reason is reason


async def test_an_incoming_guest_cannot_be_verified(short_path: Path) -> None:
    async with GuestProcess(short_path / "b.sock", "--memory", "1M", "--incoming") as guest:
        await guest.say("verify")

        assert (await guest.event("error"))["message"].startswith("cannot verify: the guest is incoming")


async def test_the_end_of_stdin_ends_the_guest(guest: GuestProcess) -> None:
    guest.process.stdin.close()

    await guest.event("bye")
    assert await guest.exit_code() == 0


async def test_a_detached_guest_outlives_its_stdin(short_path: Path) -> None:
    async with GuestProcess(short_path / "a.sock", "--memory", "1M", "--detach") as guest:
        guest.process.stdin.close()
        await guest.steps_beyond(await guest.steps_beyond(0))

        os.kill(guest.pid, signal.SIGINT)
        await guest.event("bye")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory", "many"), "'many' is not a size"),
        (("--memory", "1001"), "multiples of 4096"),
        (("--memory", "1M", "--sparse", "2"), "not a fraction"),
        (("--memory", "1M", "--seed", "-1"), "seed -1"),
        (("--memory", "1M", "--order", "odd"), "invalid"),
    ],
)
async def test_wrong_options_are_named_and_exit_with_2(short_path: Path, options: tuple[str, ...], said: str) -> None:
    guest = GuestProcess(short_path / "a.sock", *options)
    process = await asyncio.create_subprocess_exec(*guest._command, stderr=asyncio.subprocess.PIPE)

    _, errors = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 2
    assert said in errors.decode()
