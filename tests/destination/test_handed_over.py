"""What a VMM may hand over beside a userfaultfd: its memory file and a bitmap, in the right number, kind and size."""

from __future__ import annotations

import array
import asyncio
import ctypes
import json
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded import DEADLINE, HUGE, content
from sharing_vmm import SharingVmm

from made_guest_memfd import guest_memfd
from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.handed_over import Handoff
from pageferryd.destination.handoff import HandoffListener
from pageferryd.destination.memfd_installer import MemfdInstaller
from pageferryd.destination.uffd_installer import UffdInstaller
from pageferryd.destination.userfault_bitmap import bitmap_bytes
from pageferryd.linux.userfaultfd import Userfaultfd

PAGES = 100_000
GIB = 1 << 30
LAYOUT = Layout([Region(1 << 32, 60_000 * PAGE_SIZE), Region(0, 40_000 * PAGE_SIZE)])


class Vmm:
    """This process as the VMM. It keeps every descriptor that it makes until the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[int] = []
        self._open: list[Any] = []
        self._uffd: Userfaultfd | None = None
        self._maps: list[mmap.mmap] = []

    def keep(self, fd: int) -> int:
        self._made.append(fd)
        return fd

    def memfd(self, size: int, flags: int = os.MFD_ALLOW_SEALING) -> int:
        fd = self.keep(os.memfd_create("made", flags))
        os.ftruncate(fd, size)
        return fd

    def memory(self) -> int:
        return self.memfd(PAGES * PAGE_SIZE)

    def bitmap(self) -> int:
        return self.memfd(bitmap_bytes(PAGES))

    def uffd(self) -> int:
        self._open.append(uffd := Userfaultfd.open())
        self._uffd = uffd
        return uffd.fileno()

    def addresses(self, layout: Layout) -> list[int]:
        """Return where the regions are, watched by the newest userfaultfd if there is one."""
        if self._uffd is None:
            return [(index + 1) << 44 for index in range(len(layout.regions))]
        found = []
        for region in layout.regions:
            # Above its size, for an address that huge pages would have.
            memory = mmap.mmap(-1, region.size + region.page_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._maps.append(memory)
            at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            found.append(at + -at % region.page_size)
            self._uffd.register(found[-1], region.size)
        return found

    async def hand_over(self, fds: list[int], layout: Layout = LAYOUT, **fields: Any) -> Handoff:
        """Hand over a table that fits the guest, but for `fields` of its first region, with descriptors."""
        listener = HandoffListener(self.path, layout, os.getpid())
        self._open += [listener, connection := socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)]
        connection.connect(str(self.path))
        table = [
            {
                "base_host_virt_addr": address,
                "size": region.size,
                "offset": layout.starts[index] * PAGE_SIZE,
                "page_size": region.page_size,
                "gpa_start": region.guest_address,
                "is_guest_memfd": False,
            }
            for index, (region, address) in enumerate(zip(layout.regions, self.addresses(layout), strict=True))
        ]
        table[0].update(fields)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        connection.sendmsg([json.dumps(table).encode()], rights)
        handoff = await listener.receive(DEADLINE)
        self._open.append(handoff)
        return handoff

    async def refused(self, fds: list[int], layout: Layout = LAYOUT, **fields: Any) -> FerryError:
        with pytest.raises(FerryError) as refused:
            await self.hand_over(fds, layout, **fields)
        return refused.value

    def close(self) -> None:
        for one in reversed(self._open):
            one.close()
        for fd in self._made:
            os.close(fd)


@pytest.fixture
def vmm(short_dir: Path) -> Iterator[Vmm]:
    one = Vmm(short_dir / "handoff.sock")
    yield one
    one.close()


async def test_memory_and_its_bitmap_come_without_a_userfaultfd(vmm: Vmm) -> None:
    taken = await vmm.hand_over([vmm.memory(), vmm.bitmap()])
    assert taken.uffd is None
    exit_door, doors = taken.doors()
    assert list(doors) == [exit_door]
    installer = taken.installer()
    assert isinstance(installer, MemfdInstaller)
    installer.raw(70_000, 1, content(70_000), 0)
    assert os.pread(vmm._made[0], PAGE_SIZE, 70_000 * PAGE_SIZE) == content(70_000)


@pytest.mark.kvm
async def test_a_guest_memfd_is_taken_for_memory(vmm: Vmm) -> None:
    with guest_memfd(PAGES * PAGE_SIZE) as fd:
        taken = await vmm.hand_over([vmm.keep(os.dup(fd)), vmm.bitmap()], is_guest_memfd=True)
        assert taken.memory is not None
        assert taken.memory.is_guest_memfd


@pytest.mark.userfaultfd
async def test_all_three_are_told_apart_and_open_both_doors(vmm: Vmm) -> None:
    taken = await vmm.hand_over([vmm.uffd(), vmm.memory(), vmm.bitmap()])
    assert [door.name for door in taken.doors()[1]] == ["uffd", "exit"]
    assert isinstance(taken.installer(), MemfdInstaller)


@pytest.mark.userfaultfd
async def test_the_userfaultfd_may_stand_anywhere(vmm: Vmm) -> None:
    taken = await vmm.hand_over([vmm.memory(), vmm.bitmap(), vmm.uffd()])
    assert taken.uffd is not None
    assert taken.memory is not None


@pytest.mark.userfaultfd
async def test_a_userfaultfd_alone_is_as_before_and_takes_forwarded_faults_too(vmm: Vmm) -> None:
    taken = await vmm.hand_over([vmm.uffd()])
    assert isinstance(taken.installer(), UffdInstaller)
    assert [door.name for door in taken.doors()[1]] == ["uffd", "exit"]


@pytest.mark.userfaultfd
async def test_a_vmm_in_another_process_has_its_pages_through_all_three(short_dir: Path) -> None:
    path = short_dir / "handoff.sock"
    vmm = await SharingVmm.start(path, 8)
    listener = HandoffListener(path, Layout([Region(0, 8 * PAGE_SIZE)]), vmm.pid)
    try:
        await vmm.tell("go")
        taken = await listener.receive(DEADLINE)
        assert await vmm.answer() == "ready"
        installer = taken.installer()
        await vmm.tell(3)
        await asyncio.to_thread(wait_readable, taken.uffd)
        installer.raw(3, 1, content(3), 0)
        assert bytes.fromhex(await vmm.answer()) == content(3)[:8]
        await vmm.tell(4)
        await asyncio.to_thread(wait_readable, taken.uffd)
        installer.zero(4, 1)
        assert bytes.fromhex(await vmm.answer()) == bytes(8)
        installer.release()
        taken.connection.close()
    finally:
        listener.close()
        await vmm.kill()


def wait_readable(uffd: Userfaultfd | None) -> None:
    import select

    assert uffd is not None
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    assert poll.poll(DEADLINE * 1000)
    uffd.read_events()


WRONG_NUMBER: dict[str, Callable[[Vmm], list[int]]] = {
    "none": lambda vmm: [],
    "memory without a bitmap": lambda vmm: [vmm.memory()],
    "a userfaultfd and memory without a bitmap": lambda vmm: [vmm.uffd(), vmm.memory()],
    "two userfaultfds": lambda vmm: [vmm.uffd(), vmm.uffd()],
    "two userfaultfds and memory": lambda vmm: [vmm.uffd(), vmm.memory(), vmm.uffd()],
    "three files": lambda vmm: [vmm.memory(), vmm.bitmap(), vmm.bitmap()],
    "a pipe for memory": lambda vmm: [*map(vmm.keep, os.pipe())],
    "a file for memory": lambda vmm: [vmm.keep(os.open(__file__, os.O_RDONLY)), vmm.bitmap()],
    "a file for the bitmap": lambda vmm: [vmm.memory(), vmm.keep(os.open(__file__, os.O_RDONLY))],
    "memory that is read-only": lambda vmm: [
        vmm.keep(os.open(f"/proc/self/fd/{vmm.memory()}", os.O_RDONLY)),
        vmm.bitmap(),
    ],
}
WRONG_SIZE: dict[str, Callable[[Vmm], list[int]]] = {
    "the bitmap first": lambda vmm: [vmm.bitmap(), vmm.memory()],
    "memory that is too short": lambda vmm: [vmm.memfd(PAGES * PAGE_SIZE - 1), vmm.bitmap()],
    "no memory": lambda vmm: [vmm.memfd(0), vmm.bitmap()],
    "a bitmap that is too short": lambda vmm: [vmm.memory(), vmm.memfd(bitmap_bytes(PAGES) - 1)],
    "a bitmap that is too long": lambda vmm: [vmm.memory(), vmm.memfd(bitmap_bytes(PAGES) + PAGE_SIZE)],
    "a bitmap of nothing": lambda vmm: [vmm.memory(), vmm.memfd(0)],
    "a bitmap that may shrink": lambda vmm: [vmm.memory(), vmm.memfd(bitmap_bytes(PAGES), 0)],
}
CASES = [(name, make, Reason.HANDOFF_NO_FD) for name, make in WRONG_NUMBER.items()]
CASES += [(name, make, Reason.HANDOFF_REGIONS) for name, make in WRONG_SIZE.items()]


@pytest.mark.userfaultfd
@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
async def test_anything_else_is_refused_and_nothing_of_it_stays_open(
    vmm: Vmm, make: Callable[[Vmm], list[int]], reason: Reason, open_files: Callable[[], Any]
) -> None:
    fds = make(vmm)
    before = open_files()
    refusal = await vmm.refused(fds)
    assert refusal.reason is reason
    assert str(refusal)
    # What stays is the VMM's: a socket to connect with, and the listener.
    after = open_files()
    after.subtract(before)
    assert {kind: count for kind, count in after.items() if count and kind != "socket"} == {}


@pytest.mark.parametrize("gpa_start", [0, PAGE_SIZE, (1 << 32) - 1, 1 << 63])
async def test_guest_addresses_that_are_not_the_guests_are_refused(vmm: Vmm, gpa_start: int) -> None:
    refusal = await vmm.refused([vmm.memory(), vmm.bitmap()], gpa_start=gpa_start)
    assert refusal.reason is Reason.HANDOFF_REGIONS
    assert hex(1 << 32) in str(refusal)


@pytest.mark.parametrize("gpa_start", ["0", -1, 1 << 64, 1.5, None, True])
async def test_a_guest_address_that_is_no_number_is_malformed(vmm: Vmm, gpa_start: object) -> None:
    assert (await vmm.refused([vmm.memory(), vmm.bitmap()], gpa_start=gpa_start)).reason is Reason.HANDOFF_MALFORMED


GIANT = Layout([Region(0, 2 * GIB, GIB)])


@pytest.mark.userfaultfd
async def test_pages_of_a_gigabyte_are_refused_over_userfaultfd_with_the_way_to_go(vmm: Vmm) -> None:
    pages = 2 * GIB // PAGE_SIZE
    for fds in ([vmm.uffd()], [vmm.uffd(), vmm.memfd(2 * GIB), vmm.memfd(bitmap_bytes(pages))]):
        refusal = await vmm.refused(fds, GIANT)
        assert refusal.reason is Reason.HANDOFF_REGIONS
        assert "exit door" in str(refusal)


async def test_behind_the_exit_door_a_page_of_a_gigabyte_comes_in_small_ones(vmm: Vmm) -> None:
    pages = 2 * GIB // PAGE_SIZE
    taken = await vmm.hand_over([vmm.memfd(2 * GIB), vmm.memfd(bitmap_bytes(pages))], GIANT)
    assert taken.layout.uniform
    assert taken.layout.page_count == pages
    assert taken.installer().raw(12_345, 1, content(12_345), 0)[0] == 1


@pytest.mark.userfaultfd
async def test_under_a_userfaultfd_huge_pages_stay_whole(vmm: Vmm) -> None:
    layout = Layout([Region(0, 2 * HUGE, HUGE)])
    fds = [vmm.uffd(), vmm.memfd(2 * HUGE), vmm.memfd(bitmap_bytes(1024))]
    assert (await vmm.hand_over(fds, layout)).layout.granule(700) == (512, 512)
