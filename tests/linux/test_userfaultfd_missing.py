"""Missing pages of each kind of memory, and each way of filling them."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
from watched import DEADLINE, PAGE, Watched, libc, page_of, wait_events, wait_readable

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing
from pageferryd.linux.userfaultfd import Fault, Outcome, Userfaultfd

pytestmark = pytest.mark.userfaultfd
Watch = Callable[..., Watched]


def test_a_reader_waits_until_its_page_is_copied(watch: Watch, backing: Backing) -> None:
    watched = watch(2, backing)
    content = page_of(b"ferried ", watched.page)
    reading = watched.reading(1, 64)

    (fault,) = wait_events(watched.uffd)
    assert isinstance(fault, Fault)
    assert fault.address == watched.at(1)
    assert (fault.write, fault.minor, fault.write_protect) == (False, False, False)
    assert not reading.done()

    assert watched.copy(1, content) == (watched.page, Outcome.INSTALLED)
    assert reading.result(DEADLINE) == content[:64]


def test_a_writer_is_told_from_a_reader_and_writes_upon_what_was_copied(watch: Watch, backing: Backing) -> None:
    watched = watch(1, backing)
    writing = watched.writing(0, b"mine")

    (fault,) = wait_events(watched.uffd)
    assert isinstance(fault, Fault)
    assert fault.write

    watched.copy(0, page_of(b"theirs", watched.page))
    writing.result(DEADLINE)
    assert watched.memory.read(0, 8) == b"minersth"


def test_the_thread_that_waits_is_named_when_asked_for(watch: Watch) -> None:
    watched = watch(1, Backing.ANONYMOUS, abi.UFFD_FEATURE_THREAD_ID)
    reading = watched.reading(0)
    (fault,) = wait_events(watched.uffd)

    assert isinstance(fault, Fault)
    assert fault.thread > 0
    watched.zero(0)
    reading.result(DEADLINE)


@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.SHMEM])
def test_zero_pages_are_installed_without_a_source(watch: Watch, backing: Backing) -> None:
    watched = watch(8, backing)
    reading = watched.reading(7)
    wait_events(watched.uffd)

    assert watched.zero(0, 8) == (8 * PAGE, Outcome.INSTALLED)
    assert reading.result(DEADLINE) == bytes(16)
    assert watched.zero(3, 1) == (0, Outcome.EXISTS)


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
def test_zero_pages_of_hugetlbfs_are_refused_and_zeroes_can_be_copied(watch: Watch) -> None:
    watched = watch(1, Backing.HUGETLBFS)

    with pytest.raises(FerryError) as refused:
        watched.zero(0)
    assert refused.value.reason is Reason.USERFAULTFD_REFUSED

    assert watched.copy(0, bytes(watched.page)) == (watched.page, Outcome.INSTALLED)
    assert watched.memory.read(0, 16) == bytes(16)


def test_a_waiter_that_was_not_woken_goes_on_after_a_wake(watch: Watch, backing: Backing) -> None:
    watched = watch(1, backing)
    reading = watched.reading(0)
    wait_events(watched.uffd)

    assert watched.copy(0, page_of(b"quiet", watched.page), wake=False) == (watched.page, Outcome.INSTALLED)
    assert not reading.done()
    watched.uffd.wake(watched.at(0), watched.page)

    assert reading.result(DEADLINE)[:5] == b"quiet"


def test_what_exists_is_kept(watch: Watch, backing: Backing) -> None:
    watched = watch(1, backing)
    watched.copy(0, page_of(b"first", watched.page))

    assert watched.copy(0, page_of(b"second", watched.page)) == (0, Outcome.EXISTS)
    assert watched.memory.read(0, 5) == b"first"


def test_a_copy_stops_before_a_page_that_exists_and_says_so(watch: Watch, backing: Backing) -> None:
    watched = watch(4, backing)
    watched.copy(2, page_of(b"old", watched.page))
    new = page_of(b"new ", 4 * watched.page)

    assert watched.copy(0, new) == (2 * watched.page, Outcome.EXISTS)
    assert watched.copy(3, new[: watched.page]) == (watched.page, Outcome.INSTALLED)
    assert [watched.memory.read(page * watched.page, 3) for page in range(4)] == [b"new", b"new", b"old", b"new"]


def test_a_copy_reaches_over_mappings_that_the_guest_has_split(watch: Watch) -> None:
    watched = watch(16)
    assert libc.mprotect(watched.at(5), 2 * PAGE, mmap.PROT_READ) == 0
    content = b"".join(bytes([page]) * PAGE for page in range(16))

    assert watched.copy(0, content) == (16 * PAGE, Outcome.INSTALLED)
    assert watched.memory.read(0, 16 * PAGE) == content


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
def test_a_copy_reaches_over_split_mappings_of_huge_pages(watch: Watch) -> None:
    watched = watch(4, Backing.HUGETLBFS)
    assert libc.mprotect(watched.at(3), watched.page, mmap.PROT_READ) == 0
    content = b"".join(bytes([page]) * watched.page for page in range(4))

    assert watched.copy(0, content) == (len(content), Outcome.INSTALLED)
    assert watched.memory.read(0, len(content)) == content


def test_copying_half_a_page_is_refused(watch: Watch) -> None:
    watched = watch(1)
    with pytest.raises(FerryError, match="could not install") as refused:
        watched.copy(0, b"half" * 512)
    assert refused.value.reason is Reason.USERFAULTFD_REFUSED


def test_an_unregistered_range_reads_as_zeroes_and_its_waiters_go_on(watch: Watch) -> None:
    watched = watch(2)
    reading = watched.reading(0)
    wait_events(watched.uffd)

    watched.uffd.unregister(watched.at(0), 2 * PAGE)

    assert reading.result(DEADLINE) == bytes(16)
    assert watched.memory.read(PAGE, 4) == bytes(4)
    assert watched.uffd.read_events() == []


def test_no_more_events_are_read_than_asked_for(watch: Watch) -> None:
    watched = watch(3)
    readings = [watched.reading(page) for page in range(3)]
    faults = [read_one(watched.uffd) for _ in readings]

    assert {fault.address for fault in faults} == {watched.at(page) for page in range(3)}
    assert watched.uffd.read_events() == []
    watched.zero(0, 3)
    for reading in readings:
        reading.result(DEADLINE)


def read_one(uffd: Userfaultfd) -> Fault:
    wait_readable(uffd)
    (event,) = uffd.read_events(limit=1)
    assert isinstance(event, Fault)
    return event


def test_two_userfaultfds_over_one_range_are_refused(watch: Watch) -> None:
    watched = watch(1)
    with Userfaultfd.open() as second, pytest.raises(FerryError, match="another userfaultfd") as refused:
        second.register(watched.at(0), PAGE)
    assert refused.value.reason is Reason.USERFAULTFD_REFUSED


@pytest.mark.parametrize("call", ["register", "unregister", "wake"])
def test_a_range_that_is_not_whole_pages_is_refused(watch: Watch, call: str) -> None:
    watched = watch(1)
    with pytest.raises(FerryError) as refused:
        getattr(watched.uffd, call)(watched.at(0) + 1, PAGE)
    assert refused.value.reason is Reason.USERFAULTFD_REFUSED


def test_the_kernel_says_which_operations_suit_the_memory(watch: Watch) -> None:
    assert watch(1).operations >> 0x03 & 1, "UFFDIO_COPY suits anonymous memory"
