"""The userfaultfd door over real memory."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from door_conformance import DEADLINE, Delivered, DoorConformance
from guarded import Guarded

from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.door import DoorEvents
from pageferryd.destination.uffd_door import MAX_FORKS, MAX_READS, UffdDoor
from pageferryd.destination.uffd_installer import UffdInstaller
from pageferryd.linux.userfaultfd import Fork

pytestmark = pytest.mark.userfaultfd
Guard = Callable[..., Guarded]

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.mremap.restype = ctypes.c_void_p
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
# The old range stays mapped, so that nothing else comes to lie there.
MREMAP_MAYMOVE, MREMAP_DONTUNMAP = 1, 4


class UffdHouse:
    """Three regions of 8 pages in all."""

    def __init__(self, guarded: Guarded) -> None:
        self.guarded = guarded
        self.door = UffdDoor(guarded.uffd, guarded.addresses)
        self._installer = UffdInstaller(guarded.uffd, guarded.addresses)

    def touch(self, page: int) -> Future[bytes]:
        return self.guarded.reading(page, 1)

    def discard(self, page: int) -> Future[None]:
        return self.guarded.discarding(page, 1)

    def wait_queued(self) -> None:
        self.guarded.wait_queued()

    def install(self, page: int) -> None:
        self._installer.zero(page, 1)


@pytest.fixture(params=[Backing.ANONYMOUS, Backing.SHMEM])
def house(guard: Guard, request: pytest.FixtureRequest) -> UffdHouse:
    return UffdHouse(guard(3, 1, 4, backing=request.param))


class TestUffdDoor(DoorConformance):
    """Passes what every door must, and what this one does besides."""

    async def test_a_touch_from_before_it_was_opened_is_delivered(self, house: UffdHouse, delivered: Delivered) -> None:
        house.touch(1)
        house.wait_queued()
        house.door.open(delivered.take, delivered.fail)
        await delivered.until_faults(1)
        house.install(1)

    async def test_a_discard_is_delivered_and_lets_the_guest_go_on(
        self, house: UffdHouse, delivered: Delivered
    ) -> None:
        house.door.open(delivered.take, delivered.fail)
        discarding = house.discard(6)
        await asyncio.wait_for(asyncio.wrap_future(discarding), DEADLINE)
        assert delivered.discards == {(6, 1)}

    async def test_what_its_taker_cannot_do_is_reported_once_as_a_failure(
        self, house: UffdHouse, delivered: Delivered
    ) -> None:
        def refuse(_events: DoorEvents) -> None:
            raise FerryError(Reason.VMM_GONE, "the VMM ended")

        house.door.open(refuse, delivered.fail)
        house.touch(0)
        await delivered.next()
        house.touch(1)
        house.wait_queued()
        house.door.drain()

        (failure,) = delivered.failures
        assert str(failure) == "the VMM ended"
        house.install(0)
        house.install(1)


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
async def test_a_fault_in_a_huge_page_names_a_page_of_it(
    guard: Guard,
    delivered: Delivered,
) -> None:
    guarded = guard(1, 1, backing=Backing.HUGETLBFS)
    door = UffdDoor(guarded.uffd, guarded.addresses)
    door.open(delivered.take, delivered.fail)
    guarded.reading(512 + 17, 1)
    await delivered.next()
    door.close()
    (page,) = delivered.faults
    assert guarded.layout.granule(page) == (512, 512)


async def test_a_discard_of_a_whole_region_is_one_run_of_its_pages(guard: Guard, delivered: Delivered) -> None:
    guarded = guard(2, 5)
    door = UffdDoor(guarded.uffd, guarded.addresses)
    door.open(delivered.take, delivered.fail)
    await asyncio.wait_for(asyncio.wrap_future(guarded.discarding(2, 5)), DEADLINE)
    door.close()
    assert delivered.discards == {(2, 5)}


async def test_memory_that_the_vmm_unmaps_is_discarded(guard: Guard, delivered: Delivered) -> None:
    guarded = guard(4)
    door = UffdDoor(guarded.uffd, guarded.addresses)
    door.open(delivered.take, delivered.fail)
    address = guarded.addresses.address_of(1)
    await asyncio.wait_for(asyncio.to_thread(libc.munmap, address, 2 * PAGE_SIZE), DEADLINE)
    # munmap(2) does not wait for its event to be read.
    while not delivered.discards:
        await delivered.next()
    door.close()
    assert delivered.discards == {(1, 2)}


async def test_guest_memory_that_moves_is_refused_and_the_door_closes(guard: Guard, delivered: Delivered) -> None:
    guarded = guard(4)
    door = UffdDoor(guarded.uffd, guarded.addresses)
    door.open(delivered.take, delivered.fail)
    (memory,) = guarded.memories
    flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP
    moving = asyncio.create_task(asyncio.to_thread(libc.mremap, memory.address, memory.size, memory.size, flags, None))
    while not delivered.failures:
        await delivered.next()
    (failure,) = delivered.failures
    assert isinstance(failure, FerryError)
    assert failure.reason is Reason.USERFAULTFD_REFUSED
    await asyncio.wait_for(moving, DEADLINE)


async def test_faults_beyond_one_turn_of_the_loop_come_with_the_next_one(guard: Guard, delivered: Delivered) -> None:
    assert MAX_READS * 64 >= 4096
    guarded = guard(16)
    readings = [guarded.reading(page, 1) for page in range(16)]
    door = UffdDoor(guarded.uffd, guarded.addresses)
    door.open(delivered.take, delivered.fail)
    await delivered.until_faults(*range(16))
    door.close()
    UffdInstaller(guarded.uffd, guarded.addresses).zero(0, 16)
    await asyncio.gather(*map(asyncio.wrap_future, readings))


async def test_a_vmm_that_forks_without_end_is_refused(guard: Callable[..., Guarded]) -> None:
    guarded = guard(1)
    forks = [os.memfd_create("fork") for _ in range(MAX_FORKS + 1)]
    door = UffdDoor(guarded.uffd, guarded.addresses)
    failures: list[Exception] = []
    events = [[Fork(fd) for fd in forks], []]
    guarded.uffd.read_events = lambda: events.pop(0)
    door.open(lambda _events: None, failures.append)
    door.drain()
    (failure,) = failures
    assert isinstance(failure, FerryError)
    assert failure.reason is Reason.USERFAULTFD_REFUSED
    # What a child lacks would read as zeroes, were they closed.
    for fd in forks:
        os.fstat(fd)
        os.close(fd)
    door.close()
