"""Guest memory as a VMM in Python holds it: bounds, backings, and faults that stop no other thread."""

from __future__ import annotations

import os
import select
import threading

import pytest
from tiny_pager import copy_page, read_fault

from pageferry.errors import FerryError, Reason
from pageferry.vmm import Backing, GuestMemory, MemfdMemory, ProcessMemory

SMALL = [Backing.ANONYMOUS, Backing.SHMEM]


@pytest.mark.parametrize("backing", SMALL)
def test_memory_is_zeroes_at_first_and_keeps_what_is_written(backing: Backing) -> None:
    memory = GuestMemory(4 * 4096, backing)

    assert memory.read(0, memory.size) == bytes(memory.size)
    memory.write(4090, b"across a page")
    assert memory.read(4090, 13) == b"across a page"
    memory.write(memory.size, b"")
    memory.close()


@pytest.mark.parametrize("backing", SMALL)
def test_discarded_pages_read_as_zeroes(backing: Backing) -> None:
    memory = GuestMemory(4 * 4096, backing)
    memory.write(0, b"x" * memory.size)

    memory.discard(4096, 8192)

    assert memory.read(0, memory.size) == b"x" * 4096 + bytes(8192) + b"x" * 4096
    memory.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 4097), (4096, 1), (1 << 64, 1), (0, -1)])
def test_an_access_outside_is_an_index_error(offset: int, length: int) -> None:
    memory = GuestMemory(4096)

    with pytest.raises(IndexError):
        memory.read(offset, length)
    if length > 0:
        with pytest.raises(IndexError):
            memory.write(offset, bytes(length))
    memory.close()


def test_after_close_every_access_is_outside() -> None:
    memory = GuestMemory(4096)
    memory.close()
    memory.close()

    with pytest.raises(IndexError):
        memory.read(0, 1)


@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (0, 100)])
def test_only_whole_pages_are_discarded(offset: int, length: int) -> None:
    memory = GuestMemory(2 * 4096)

    with pytest.raises(ValueError, match="whole pages"):
        memory.discard(offset, length)
    memory.close()


@pytest.mark.parametrize(
    ("size", "backing"),
    [(0, Backing.ANONYMOUS), (-4096, Backing.SHMEM), (100, Backing.SHMEM), (4096, Backing.HUGETLBFS)],
)
def test_a_size_that_is_not_whole_pages_is_refused(size: int, backing: Backing) -> None:
    with pytest.raises(FerryError) as refused:
        GuestMemory(size, backing)

    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_memory_that_the_machine_does_not_have_is_refused() -> None:
    with pytest.raises(FerryError) as refused:
        GuestMemory(1 << 60)

    assert refused.value.reason is Reason.NO_SPACE


def test_anonymous_memory_can_be_read_where_it_says() -> None:
    memory = GuestMemory(2 * 4096)
    memory.write(4096, b"here")

    place = memory.location(4096)

    assert isinstance(place, ProcessMemory)
    with open("/proc/self/mem", "rb", buffering=0) as own:
        own.seek(place.address)
        assert own.read(4) == b"here"
    memory.close()


def test_shared_memory_can_be_read_through_its_memfd() -> None:
    memory = GuestMemory(2 * 4096, Backing.SHMEM)
    memory.write(4096, b"here")

    place = memory.location(4096)

    assert isinstance(place, MemfdMemory)
    assert os.pread(place.fd, 4, place.offset) == b"here"
    memory.close()


@pytest.mark.root
@pytest.mark.userfaultfd
@pytest.mark.parametrize("backing", SMALL)
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_thread_that_waits_in_a_fault_stops_no_other(backing: Backing, access: str) -> None:
    memory = GuestMemory(4096, backing)
    uffd = memory.open_userfault()
    done = threading.Event()

    def touch() -> None:
        memory.read(100, 4) if access == "read" else memory.write(100, b"mine")
        done.set()

    thread = threading.Thread(target=touch)
    thread.start()
    # This thread goes on: with the GIL held by the other one it would hang here.
    assert select.select([uffd], [], [], 20)[0]
    assert read_fault(uffd) == memory.address
    assert not done.is_set()
    assert copy_page(uffd, memory.address, b"page" * 1024)
    thread.join(20)

    assert memory.read(100, 4) == (b"page" if access == "read" else b"mine")
    os.close(uffd)
    memory.close()


@pytest.mark.root
@pytest.mark.userfaultfd
def test_released_memory_is_free_of_its_userfaultfd() -> None:
    memory = GuestMemory(4096)
    memory.release_userfault(memory.open_userfault())

    assert memory.read(0, 4) == bytes(4)
    memory.close()


@pytest.mark.root
@pytest.mark.userfaultfd
def test_memory_that_has_a_userfaultfd_gets_no_second_one() -> None:
    memory = GuestMemory(4096)
    uffd = memory.open_userfault()

    with pytest.raises(FerryError) as refused:
        memory.open_userfault()

    assert refused.value.reason is Reason.USERFAULTFD_REFUSED
    memory.release_userfault(uffd)
    memory.close()
