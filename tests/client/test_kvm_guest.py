"""The KVM guest on a real vCPU, in this process: its program proves its memory, and so does the check from outside."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import queue
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from guest_memfd_pager import GuestMemfdPager

from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.guest import KvmGuest
from pageferry.guests.kvm.layout import Layout
from pageferry.guests.kvm.program import HOLE_RUN, Order, Work
from pageferry.guests.kvm.state import State
from pageferry.vmm import Backing, ProcessMemory, VmmState

pytestmark = pytest.mark.kvm

PAGE = 4096
MIB = 1 << 20
DEADLINE = 30.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what the vCPU does sets no event
            await asyncio.sleep(0.005)


async def passes(guest: KvmGuest, pages: int, count: int) -> None:
    """Wait until the guest has done `count` more passes over its data pages."""
    goal = guest.status().steps + count * pages
    await until(lambda: guest.status().steps > goal)


@contextlib.asynccontextmanager
async def booted(
    size: int = MIB, order: Order = Order.RANDOM, backing: Backing = Backing.ANONYMOUS, seed: int = 7
) -> AsyncIterator[KvmGuest]:
    guest = KvmGuest(size, backing, on_kill=lambda: None)
    guest.boot(seed, order)
    try:
        yield guest
    finally:
        with contextlib.suppress(FerryError):
            await guest.close()


async def memory_address(guest: KvmGuest) -> int:
    (region,) = (await guest.describe_memory()).regions
    assert isinstance(region.location, ProcessMemory)
    return region.location.address


def overwrite(address: int, offset: int, data: bytes) -> None:
    ctypes.memmove(address + offset, data, len(data))


def read_page(address: int) -> bytes:
    return ctypes.string_at(address, PAGE)


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("size", [64 * PAGE, MIB, 4 * MIB + 3 * PAGE, 64 * MIB])
async def test_a_guest_of_any_size_finds_its_memory_whole(size: int, order: Order) -> None:
    async with booted(size, order) as guest:
        # Far enough for each page to have been a hole, and to have been none.
        await passes(guest, Layout.of(size).data_pages, 9)

        verified = await guest.verify()

        assert (verified.pages, verified.bad, verified.first_bad) == (size // PAGE, 0, [])
        assert guest.status().errors == 0


async def test_a_guest_on_guest_memfd_finds_its_memory_whole() -> None:
    async with booted(4 * MIB, backing=Backing.GUEST_MEMFD) as guest:
        await passes(guest, Layout.of(4 * MIB).data_pages, 2)

        assert (await guest.verify()).bad == 0
        assert await memory_address(guest)


async def test_a_guest_on_guest_memfd_can_be_closed_while_its_vcpu_waits_for_a_page(short_path: Path) -> None:
    async with booted(backing=Backing.GUEST_MEMFD) as source:
        await source.pause()
        state = await source.save_state()
        address = await memory_address(source)
        pager = GuestMemfdPager(short_path)
        pager.serve(lambda offset: read_page(address + offset))
        target = KvmGuest(MIB, Backing.GUEST_MEMFD, on_kill=lambda: None)
        await target.use_fault_service(pager.service.endpoint)
        await target.attach_pager(pager.path)
        await target.load_state(state)
        before = len(pager.faulted)
        unanswered = pager.unanswered = queue.SimpleQueue()
        await target.resume()
        while unanswered.get(timeout=20) < Layout.of(MIB).data_address:
            pass

        with pytest.raises(FerryError) as failed:
            await target.close()

        assert failed.value.reason is Reason.CANCELLED
        assert len(pager.faulted) == before
        pager.close()


async def test_memory_is_whole_wherever_the_guest_is_stopped() -> None:
    async with booted(64 * PAGE, backing=Backing.SHMEM) as guest:
        for _ in range(200):
            assert (await guest.verify()).first_bad == []


async def test_the_guest_reports_a_page_that_was_changed_behind_its_back() -> None:
    async with booted() as guest:
        layout = Layout.of(MIB)
        await guest.pause()
        regs = State.unpack(await guest.save_state(), layout).regs
        # Not the current page, which may be half written just now.
        victim = Work.from_registers(regs).page_at(regs.rbx + 20)
        address = layout.data_address + victim * PAGE
        overwrite(await memory_address(guest), address + 8 * 300, b"\xa5" * 8)
        await guest.resume()

        await until(lambda: guest.status().errors > 0)

        (message,) = guest.take_findings()
        assert message.startswith(f"data page {victim} at {address:#x} is not at version ")
        assert "qword 300 " in message
        assert guest.status().state == "running"
        # The program went on, and wrote the page anew.
        assert (await guest.verify()).bad == 0


async def test_a_check_finds_what_is_wrong_anywhere_in_memory() -> None:
    async with booted() as guest:
        layout = Layout.of(MIB)
        await passes(guest, layout.data_pages, 1)
        await guest.pause()
        code, table, data = layout.entry, layout.root_table + 8, layout.data_address + 8
        unused = MIB - 8
        for offset in (code + 2048, table, data, unused):
            overwrite(await memory_address(guest), offset, b"\x5a" * 8)

        verified = await guest.verify()

        assert verified.bad == 4
        assert [text.partition(":")[0] for text in verified.first_bad] == [
            f"page {offset // PAGE}" for offset in (code, table, data, unused)
        ]


async def test_a_check_finds_pages_that_are_stale_or_exchanged() -> None:
    async with booted() as guest:
        layout = Layout.of(MIB)
        start = await memory_address(guest) + layout.data_address
        await guest.pause()
        # Of two runs of pages one at most is a hole, which may have become one again later.
        old = next(number for number in (5, 5 + HOLE_RUN) if read_page(start + number * PAGE) != bytes(PAGE))
        stale = read_page(start + old * PAGE)
        await guest.resume()
        await passes(guest, layout.data_pages, 1)
        await guest.pause()
        overwrite(start, old * PAGE, stale)
        overwrite(start, 100 * PAGE, stale)

        verified = await guest.verify()

        assert [text.partition(":")[0] for text in verified.first_bad] == [
            f"page {layout.first_data_page + number}" for number in (old, 100)
        ]


async def test_a_paused_guest_stands_still_even_after_it_was_verified() -> None:
    async with booted() as guest:
        await guest.pause()
        before = guest.status()

        await guest.verify()

        assert before.state == "paused"
        assert guest.status() == before
        assert await guest.save_state() == await guest.save_state()

        await guest.resume()
        await until(lambda: guest.status().steps > before.steps)


async def test_a_pause_is_completed_when_its_caller_gives_up() -> None:
    async with booted() as guest:
        pausing = asyncio.create_task(guest.pause())
        await asyncio.sleep(0)
        pausing.cancel()
        await asyncio.wait([pausing])

        await guest.pause()

        assert (await guest.describe_memory()).state is VmmState.PAUSED


async def test_a_check_that_is_given_up_lets_the_guest_go_on() -> None:
    async with booted(64 * MIB) as guest:
        verifying = asyncio.create_task(guest.verify())
        await asyncio.sleep(0)
        verifying.cancel()
        await asyncio.wait([verifying])

        await passes(guest, 1, 1)


async def test_the_state_of_a_guest_tells_where_it_stands() -> None:
    async with booted(4 * MIB, seed=(1 << 63) - 1) as guest:
        await passes(guest, 1, 1)
        await guest.pause()

        state = State.unpack(await guest.save_state(), Layout.of(4 * MIB))

        # The pause may come between the count of a step and its store.
        assert state.regs.rbx - guest.status().steps in (0, 1)
        assert state.regs.r14 == (1 << 63) - 1


async def test_a_guest_whose_vcpu_failed_says_why_and_can_only_be_killed() -> None:
    kills: list[str] = []
    guest = KvmGuest(MIB, on_kill=lambda: kills.append("killed"))
    guest.boot(7, Order.RANDOM)
    await guest.pause()
    overwrite(await memory_address(guest), Layout.of(MIB).entry, b"\x0f\x0b" * 200)

    await guest.resume()
    await until(lambda: guest.status().state == "failed")

    (finding,) = guest.take_findings()
    assert finding.startswith("the vCPU stopped at 0x")
    assert guest.take_findings() == []
    for call in (guest.describe_memory, guest.verify, guest.pause):
        with pytest.raises(FerryError) as failure:
            await call()
        assert failure.value.reason is Reason.VMM_FAILED
    await guest.kill()
    assert kills == ["killed"]
