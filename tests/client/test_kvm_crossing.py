"""The KVM guest as two real processes: its vCPU faults in the kernel while its memory crosses page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from guest_process import GuestProcess
from tiny_pager import TinyPager

from pageferry.errors import Reason, from_rpc
from pageferry.v1 import vmm_pb2

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.userfaultfd]

MODULE = "pageferry.guests.kvm"
PAGE = 4096
MEMORY = "4M"
PAGES = 1024


@pytest.fixture
async def guest(short_path: Path) -> AsyncIterator[GuestProcess]:
    async with GuestProcess(short_path / "a.sock", "--memory", MEMORY, "--seed", "7", module=MODULE) as running:
        yield running


@pytest.fixture
async def target(short_path: Path) -> AsyncIterator[GuestProcess]:
    async with GuestProcess(short_path / "b.sock", "--memory", MEMORY, "--incoming", module=MODULE) as incoming:
        yield incoming


async def page_reader(guest: GuestProcess) -> Callable[[int], bytes]:
    """Return a function that reads the page at an offset out of the guest's process."""
    location = (await guest.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())).locations[0]
    if location.HasField("memfd"):
        path, start = f"/proc/{guest.pid}/fd/{location.memfd.fd}", location.memfd.offset
    else:
        path, start = f"/proc/{guest.pid}/mem", location.process.address

    def read(offset: int) -> bytes:
        with open(path, "rb", buffering=0) as memory:
            memory.seek(start + offset)
            return memory.read(PAGE)

    return read


async def hand_over(guest: GuestProcess, target: GuestProcess, pager: TinyPager) -> int:
    """Pause the guest and let its successor run without a single page; return the steps done until then."""
    await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=pager.path))
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    saved = await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())
    await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=saved.state))
    await target.vmm.Resume(vmm_pb2.ResumeRequest())
    return int((await guest.status())["steps"])


@pytest.mark.parametrize("backing", ["anonymous", "shmem"])
@pytest.mark.parametrize("order", ["random", "sequential"])
async def test_a_guest_crosses_into_an_incoming_one_page_by_page(
    short_path: Path, tiny_pager: TinyPager, order: str, backing: str
) -> None:
    options = ("--memory", MEMORY, "--order", order, "--backing", backing)
    async with (
        GuestProcess(short_path / "a.sock", *options, module=MODULE) as guest,
        GuestProcess(short_path / "b.sock", *options, "--incoming", module=MODULE) as target,
    ):
        await guest.steps_beyond(5 * PAGES)
        tiny_pager.serve(await page_reader(guest))
        crossed_at = await hand_over(guest, target, tiny_pager)

        await target.steps_beyond(crossed_at + PAGES)
        await asyncio.to_thread(tiny_pager.finish)
        await target.vmm.DetachPager(vmm_pb2.DetachPagerRequest())

        # The program, its page tables and its data; all of them faulted, for nothing was written before.
        assert tiny_pager.faults > PAGES // 2
        assert await target.verify() == {"event": "verified", "pages": PAGES, "bad": 0, "first_bad": []}
        assert (await target.status())["errors"] == 0


async def test_a_guest_that_has_arrived_can_leave_again(
    guest: GuestProcess, target: GuestProcess, short_path: Path, tiny_pager: TinyPager
) -> None:
    tiny_pager.serve(await page_reader(guest))
    await hand_over(guest, target, tiny_pager)
    await asyncio.to_thread(tiny_pager.finish)
    await target.vmm.DetachPager(vmm_pb2.DetachPagerRequest())
    second_pager = TinyPager(short_path / "second.sock")
    try:
        async with GuestProcess(short_path / "c.sock", "--memory", MEMORY, "--incoming", module=MODULE) as third:
            second_pager.serve(await page_reader(target))
            crossed_at = await hand_over(target, third, second_pager)
            await third.steps_beyond(crossed_at + PAGES)

            assert (await third.verify())["bad"] == 0
    finally:
        second_pager.close()


async def test_a_stale_page_that_crosses_is_found_by_the_guest(
    guest: GuestProcess, target: GuestProcess, tiny_pager: TinyPager
) -> None:
    read = await page_reader(guest)
    victim = 500 * PAGE
    async with asyncio.timeout(30):
        # Not at a version at which the page is a hole: it may be one again when it crosses.
        while (stale := read(victim)) == bytes(PAGE):
            await guest.steps_beyond((await guest.status())["steps"])
    await guest.steps_beyond((await guest.status())["steps"] + 3 * PAGES)
    tiny_pager.serve(lambda offset: stale if offset == victim else read(offset))

    await hand_over(guest, target, tiny_pager)
    found = await target.event("error")

    assert f"at {victim:#x}" in found["message"]
    assert (await target.event("progress", errors=1))["state"] == "running"


async def test_a_guest_that_waits_for_its_first_page_still_answers(
    guest: GuestProcess, target: GuestProcess, tiny_pager: TinyPager
) -> None:
    crossed_at = await hand_over(guest, target, tiny_pager)

    described = await target.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())
    assert described.state == vmm_pb2.VMM_STATE_RUNNING
    assert (await target.status())["steps"] == crossed_at

    pausing = asyncio.ensure_future(target.vmm.Pause(vmm_pb2.PauseRequest()))
    tiny_pager.serve(await page_reader(guest))
    await pausing
    assert (await target.status())["state"] == "paused"


@pytest.mark.parametrize("ending", ["quit", "kill"])
async def test_a_guest_that_waits_for_a_page_that_never_comes_can_be_ended(
    guest: GuestProcess, target: GuestProcess, short_path: Path, tiny_pager: TinyPager, ending: str
) -> None:
    await hand_over(guest, target, tiny_pager)

    if ending == "quit":
        await target.say("quit")
    else:
        await target.vmm.Kill(vmm_pb2.KillRequest())

    await target.event("bye")
    assert await target.exit_code() == 0
    assert not (short_path / "b.sock").exists()


async def test_an_incoming_guest_refuses_nonsense_and_what_comes_too_early(
    guest: GuestProcess, target: GuestProcess, tiny_pager: TinyPager
) -> None:
    await target.say("verify")
    assert "has not arrived" in (await target.event("error"))["message"]
    await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=tiny_pager.path))

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=b"nonsense"))

    assert from_rpc(refused.value, Reason.INTERNAL).reason is Reason.INVALID_ARGUMENT
    # It can still take the right one.
    tiny_pager.serve(await page_reader(guest))
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    saved = await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())
    await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=saved.state))
    await target.vmm.Resume(vmm_pb2.ResumeRequest())
    await target.steps_beyond((await guest.status())["steps"])
