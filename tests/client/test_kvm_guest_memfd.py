"""The KVM guest on guest_memfd: no userfaultfd sees its vCPU, which exits on pages that have not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
from guest_memfd_pager import GuestMemfdPager
from guest_process import GuestProcess

from pageferry.errors import Reason, from_rpc
from pageferry.guests.kvm.layout import Layout
from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import vmm_pb2

pytestmark = [pytest.mark.kvm, pytest.mark.root]

MODULE = "pageferry.guests.kvm"
PAGE = 4096
MEMORY = 8 << 20
PAGES = MEMORY // PAGE
FIRST_DATA_PAGE = Layout.of(MEMORY).first_data_page
OPTIONS = ("--memory", str(MEMORY), "--backing", "guest_memfd")


@pytest.fixture
async def guest(short_path: Path) -> AsyncIterator[GuestProcess]:
    async with GuestProcess(short_path / "a.sock", *OPTIONS, "--seed", "7", module=MODULE) as running:
        yield running


@pytest.fixture
async def target(short_path: Path) -> AsyncIterator[GuestProcess]:
    async with GuestProcess(short_path / "b.sock", *OPTIONS, "--incoming", module=MODULE) as incoming:
        yield incoming


@pytest.fixture
def pager(short_path: Path) -> Iterator[GuestMemfdPager]:
    opened = GuestMemfdPager(short_path)
    yield opened
    opened.close()


async def page_reader(guest: GuestProcess) -> Callable[[int], bytes]:
    location = (await guest.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())).locations[0]
    start = location.process.address

    def read(offset: int) -> bytes:
        with open(f"/proc/{guest.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(start + offset)
            return memory.read(PAGE)

    return read


async def load(guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager) -> int:
    """Attach the pager and move the paused guest's state over; return the steps done until then."""
    await target.vmm.AttachPager(pager.attach_request)
    await guest.vmm.Pause(vmm_pb2.PauseRequest())
    saved = await guest.vmm.SaveState(vmm_pb2.SaveStateRequest())
    await target.vmm.LoadState(vmm_pb2.LoadStateRequest(state=saved.state))
    return int((await guest.status())["steps"])


async def hand_over(guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager) -> int:
    pager.serve(await page_reader(guest))
    steps = await load(guest, target, pager)
    await target.vmm.Resume(vmm_pb2.ResumeRequest())
    return steps


async def arrive(target: GuestProcess, pager: GuestMemfdPager) -> None:
    await asyncio.to_thread(pager.finish)
    await target.vmm.DetachPager(vmm_pb2.DetachPagerRequest())


async def test_a_guest_crosses_page_by_page_through_exits_alone(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    await guest.steps_beyond(3 * PAGES)

    crossed_at = await hand_over(guest, target, pager)
    await target.steps_beyond(crossed_at + PAGES)
    # A page has faulted once at most, and each that the program has touched has.
    assert len(pager.faulted) == len(set(pager.faulted)) > PAGES // 2
    await arrive(target, pager)

    assert await target.verify() == {"event": "verified", "pages": PAGES, "bad": 0, "first_bad": []}
    status = await target.status()
    assert status["errors"] == 0
    assert status["longest_stall_ms"] > 0


async def test_pages_that_were_pushed_do_not_fault(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    pager.serve(await page_reader(guest))
    crossed_at = await load(guest, target, pager)
    await asyncio.to_thread(pager.push, PAGES // 2, PAGES)
    await target.vmm.Resume(vmm_pb2.ResumeRequest())

    await target.steps_beyond(crossed_at + PAGES)
    await arrive(target, pager)

    assert max(pager.faulted) < PAGES // 2
    assert (await target.verify())["bad"] == 0
    assert (await target.status())["errors"] == 0


async def test_a_check_while_pages_are_missing_gets_them_first(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    crossed_at = await hand_over(guest, target, pager)

    verified = await target.verify()

    assert (verified["pages"], verified["bad"]) == (PAGES, 0)
    await target.steps_beyond(crossed_at)


async def test_a_guest_that_has_arrived_can_leave_again(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager, short_path: Path
) -> None:
    await hand_over(guest, target, pager)
    await arrive(target, pager)
    (short_path / "second").mkdir()
    second = GuestMemfdPager(short_path / "second")
    try:
        async with GuestProcess(short_path / "c.sock", *OPTIONS, "--incoming", module=MODULE) as third:
            crossed_at = await hand_over(target, third, second)
            await third.steps_beyond(crossed_at + PAGES)
            await arrive(third, second)

            assert (await third.verify())["bad"] == 0
            assert (await third.status())["errors"] == 0
    finally:
        second.close()


async def test_what_the_vcpu_needs_to_run_at_all_is_there_before_it_runs(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    pager.serve(await page_reader(guest))

    await load(guest, target, pager)

    assert sorted(pager.faulted) == list(range(Layout.of(MEMORY).entry // PAGE, FIRST_DATA_PAGE))


async def test_a_paused_guest_has_finished_its_access_and_stands_still(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    crossed_at = await hand_over(guest, target, pager)
    await target.steps_beyond(crossed_at + 20)

    await target.vmm.Pause(vmm_pb2.PauseRequest())

    before = await target.status()
    assert before["state"] == "paused"
    assert (await target.verify())["bad"] == 0
    assert (await target.status())["steps"] == before["steps"]
    await target.vmm.Resume(vmm_pb2.ResumeRequest())
    await target.steps_beyond(before["steps"] + PAGES)


@pytest.mark.parametrize("ending", ["quit", "kill"])
async def test_a_guest_whose_page_never_comes_can_be_ended(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager, short_path: Path, ending: str
) -> None:
    await hand_over(guest, target, pager)
    pager.service.answer = lambda request: None
    described = await target.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())
    assert described.state == vmm_pb2.VMM_STATE_RUNNING

    if ending == "quit":
        await target.say("quit")
    else:
        await target.vmm.Kill(vmm_pb2.KillRequest())

    await target.event("bye")
    assert await target.exit_code() == 0
    assert not (short_path / "b.sock").exists()


async def test_a_pager_that_dies_and_comes_back_is_asked_again(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    crossed_at = await hand_over(guest, target, pager)
    await target.steps_beyond(crossed_at + 20)

    await asyncio.to_thread(pager.service.stop)
    pager.service.start()

    await target.steps_beyond(crossed_at + PAGES)
    await arrive(target, pager)
    assert (await target.verify())["bad"] == 0


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (pb.OUTCOME_POISONED, "could not read"),
        (pb.OUTCOME_INSTALLED, "has not cleared"),
        (pb.OUTCOME_REFUSED, "refused the fault"),
    ],
)
async def test_a_page_that_cannot_come_stops_the_guest_and_is_never_zero(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager, outcome: int, words: str
) -> None:
    pager.serve(await page_reader(guest))
    crossed_at = await load(guest, target, pager)
    pager.outcome = outcome

    await target.vmm.Resume(vmm_pb2.ResumeRequest())

    assert words in (await target.event("error"))["message"]
    status = await target.event("progress", state="failed")
    assert status["errors"] == 0
    assert status["steps"] in (0, crossed_at, crossed_at + 1)


async def test_a_pager_without_a_fault_service_is_refused(target: GuestProcess, pager: GuestMemfdPager) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await target.vmm.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=pager.path))

    assert from_rpc(refused.value, Reason.INTERNAL).reason is Reason.PROTOCOL_MISMATCH
    # It can be attached to one that has it.
    await target.vmm.AttachPager(pager.attach_request)


async def test_memory_shows_a_stale_page_that_came(
    guest: GuestProcess, target: GuestProcess, pager: GuestMemfdPager
) -> None:
    read = await page_reader(guest)
    victim = 500 * PAGE
    async with asyncio.timeout(30):
        while (stale := read(victim)) == bytes(PAGE):
            await guest.steps_beyond((await guest.status())["steps"])
    await guest.steps_beyond((await guest.status())["steps"] + 3 * PAGES)
    pager.serve(lambda offset: stale if offset == victim else read(offset))
    await load(guest, target, pager)
    await target.vmm.Resume(vmm_pb2.ResumeRequest())

    found = await target.event("error")

    assert f"at {victim:#x}" in found["message"]
