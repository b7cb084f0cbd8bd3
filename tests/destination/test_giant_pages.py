"""Memory in pages of 1 GiB: a userfaultfd could bring it only whole; behind the exit door it comes page by page."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from guarded import DEADLINE, content
from queue_lanes import QueueSource

from pageferry.errors import FerryError, Reason
from pageferry.vmm.bitmap import UserfaultBitmap as VmmBitmap
from pageferry.vmm.mapping import MappedMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.door import Settled
from pageferryd.destination.handed_over import assemble
from pageferryd.destination.session import Session, SessionOptions
from pageferryd.linux.userfaultfd import Userfaultfd

pytestmark = [pytest.mark.hugetlb, pytest.mark.root]

GIANT = 1 << 30
PAGES = GIANT // PAGE_SIZE
USED = frozenset({0, 1, 2, 7, 511, 512, 1000, PAGES // 2, PAGES - 1})
"""Pages that hold something; all others are holes."""
_SETTING = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
_MFD_HUGE_1GB = 30 << 26


@pytest.fixture
def giant_page() -> Iterator[None]:
    """One page of 1 GiB, given back afterwards."""
    try:
        before = int(_SETTING.read_text())
        _SETTING.write_text(str(before + 1))
    except OSError as error:
        pytest.skip(f"no pages of 1 GiB on this machine: {error}")
    try:
        if int(_SETTING.read_text()) <= before:
            pytest.skip("no page of 1 GiB can be reserved: memory is too fragmented, or there is not enough")
        yield
    finally:
        _SETTING.write_text(str(before))


class GiantGuest:
    """A guest of one page, as its VMM hands it over, on its way in from a source behind queues."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("giant", os.MFD_CLOEXEC | os.MFD_HUGETLB | _MFD_HUGE_1GB)
        os.ftruncate(self.fd, GIANT)
        self.memory = MappedMemory(GIANT, self.fd)
        self.bits = VmmBitmap(PAGES)
        self.addresses = AddressMap(Layout([Region(0, GIANT, GIANT)]), [self.memory.address])
        self._here, self._there = socket.socketpair()

    def start(self) -> None:
        fds = [os.dup(self.fd), os.dup(self.bits.memfd)]
        handoff = assemble(fds, self.addresses, self._here)
        assert fds == []
        self.installer = handoff.installer()
        self.source = QueueSource(handoff.layout, lambda page: content(page) if page in USED else None)
        self.door, doors = handoff.doors()
        options = SessionOptions(PagerOptions(fault_around=0, pacing=PacingOptions(disabled=True)))
        self.session = Session(handoff.layout, doors, self.installer, self.source, options)
        self.session.open_doors()
        self.running = asyncio.create_task(self.session.run())

    async def fault(self, page: int, pages: int = 1) -> Settled:
        """Forward a vCPU's exit and wait for the end of it."""
        settled: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self.door.fault(page, pages, settled.set_result)
        return await asyncio.wait_for(settled, DEADLINE)

    def page(self, page: int) -> bytes:
        return self.memory.read(page * PAGE_SIZE, PAGE_SIZE)

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.session.close()
        self.installer.abandon()
        self.source.close()

    def let_go(self) -> None:
        for end in (self._here, self._there):
            end.close()
        self.memory.close()
        self.bits.close()
        os.close(self.fd)


@pytest.fixture
def memory(giant_page: None) -> Iterator[GiantGuest]:
    guest = GiantGuest()
    yield guest
    guest.let_go()


@pytest.fixture
async def guest(memory: GiantGuest) -> AsyncIterator[GiantGuest]:
    memory.start()
    yield memory
    await memory.close()


async def test_a_fault_brings_one_small_page_of_it(guest: GiantGuest) -> None:
    for page in (PAGES - 1, 7, PAGES // 2):
        assert await guest.fault(page) is Settled.INSTALLED
        assert guest.page(page) == content(page)
    assert await guest.fault(3) is Settled.ZERO
    came = {page for page in USED | {3} if not guest.bits.is_set(page)}
    assert came == {3, 7, PAGES // 2, PAGES - 1}
    assert guest.session.pager.map.missing == PAGES - 4


async def test_a_fault_may_name_up_to_two_mebibytes_of_it(guest: GiantGuest) -> None:
    assert await guest.fault(0, 512) is Settled.INSTALLED
    assert [guest.page(page) for page in (0, 1, 7, 8, 511)] == [
        content(0), content(1), content(7), bytes(PAGE_SIZE), content(511),
    ]  # fmt: skip
    with pytest.raises(FerryError) as refused:
        await guest.fault(0, 513)
    assert refused.value.reason is Reason.INVALID_ARGUMENT


async def test_pushed_it_arrives_whole_and_the_source_is_told(guest: GiantGuest) -> None:
    assert await guest.fault(1000) is Settled.INSTALLED
    guest.session.set_pacing(PacingOptions())
    guest.session.start_push()
    await asyncio.wait_for(asyncio.shield(guest.running), DEADLINE)
    assert guest.source.completions == 1
    assert guest.bits.set_runs(0, PAGES) == []
    for page in sorted(USED):
        assert guest.page(page) == content(page)
        if page + 1 < PAGES and page + 1 not in USED:
            assert guest.page(page + 1) == bytes(PAGE_SIZE)


async def test_what_the_guest_converts_of_it_is_zero_and_never_comes(guest: GiantGuest) -> None:
    guest.session.convert(512, 1)
    assert await guest.fault(512) is Settled.ZERO
    assert await guest.fault(511) is Settled.INSTALLED
    assert guest.page(512) == bytes(PAGE_SIZE)


@pytest.mark.userfaultfd
def test_under_a_userfaultfd_it_is_refused_with_the_remedy(memory: GiantGuest) -> None:
    uffd = Userfaultfd.open(0)
    connection, other = socket.socketpair()
    try:
        with pytest.raises(FerryError, match="exit door") as refused:
            assemble([os.dup(uffd.fileno())], memory.addresses, connection)
        assert refused.value.reason is Reason.HANDOFF_REGIONS
    finally:
        uffd.close()
        connection.close()
        other.close()
