"""Each way in which filling a page can end, caused in the kernel; INSTALLED and EXISTS are in the tests of MISSING."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from child_guest import ChildGuest
from watched import DEADLINE, EVENTS, PAGE, Watched, libc, page_of, wait_events, wait_readable

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing
from pageferryd.linux.buffers import address_of
from pageferryd.linux.userfaultfd import Outcome, Remove

pytestmark = pytest.mark.userfaultfd
Watch = Callable[..., Watched]
CONTENT = page_of(b"ferried ")


def fill_each_way(watched: Watched, page: int) -> list[tuple[int, Outcome]]:
    return [
        watched.copy(page, CONTENT),
        watched.zero(page),
        watched.uffd.poison(watched.at(page), PAGE),
    ]


def until_not_retried(fill: Callable[[], tuple[int, Outcome]]) -> tuple[int, Outcome]:
    deadline = time.monotonic() + DEADLINE
    while (outcome := fill())[1] is Outcome.RETRY:
        assert time.monotonic() < deadline, "the kernel refuses for ever, though its events were read"
    return outcome


def test_while_an_event_is_not_read_every_filling_is_to_be_tried_again(watch: Watch) -> None:
    watched = watch(4, Backing.ANONYMOUS, EVENTS)
    watched.copy(0, CONTENT)
    discarding = watched.doing(watched.memory.discard, 0, PAGE)
    wait_readable(watched.uffd)

    assert fill_each_way(watched, 1) == [(0, Outcome.RETRY)] * 3
    assert watched.copy(1, CONTENT * 3) == (0, Outcome.RETRY)

    assert wait_events(watched.uffd) == [Remove(watched.at(0), watched.at(1))]
    discarding.result(DEADLINE)
    assert until_not_retried(lambda: watched.copy(1, CONTENT)) == (PAGE, Outcome.INSTALLED)


def test_a_minor_fault_is_to_be_tried_again_too(watch: Watch) -> None:
    watched = watch(2, Backing.SHMEM, EVENTS | abi.UFFD_FEATURE_MINOR_SHMEM, minor=True)
    os.pwrite(watched.memory.memfd, CONTENT, 0)
    discarding = watched.doing(watched.memory.discard, PAGE, PAGE)
    wait_readable(watched.uffd)

    assert watched.uffd.resolve_minor(watched.at(0), PAGE) == (0, Outcome.RETRY)

    assert wait_events(watched.uffd) == [Remove(watched.at(1), watched.at(2))]
    discarding.result(DEADLINE)
    assert until_not_retried(lambda: watched.uffd.resolve_minor(watched.at(0), PAGE)) == (PAGE, Outcome.INSTALLED)


def test_pages_that_were_unmapped_are_told_from_those_before_them(watch: Watch, backing: Backing) -> None:
    watched = watch(4, backing)
    assert libc.munmap(watched.at(2), 2 * watched.page) == 0

    assert watched.copy(2, page_of(b"x", watched.page)) == (0, Outcome.UNMAPPED)
    assert watched.copy(0, page_of(b"x", 4 * watched.page)) == (2 * watched.page, Outcome.UNMAPPED)
    assert watched.uffd.poison(watched.at(3), watched.page) == (0, Outcome.UNMAPPED)


def test_pages_that_were_unregistered_are_unmapped_as_well(watch: Watch) -> None:
    watched = watch(4)
    watched.uffd.unregister(watched.at(3), PAGE)

    assert fill_each_way(watched, 3) == [(0, Outcome.UNMAPPED)] * 3
    assert watched.copy(0, CONTENT * 4) == (3 * PAGE, Outcome.UNMAPPED)


def test_pages_beyond_the_end_of_their_file_are_unmapped(watch: Watch) -> None:
    watched = watch(2, Backing.SHMEM)
    os.ftruncate(watched.memory.memfd, PAGE)

    assert watched.copy(0, CONTENT * 2) == (PAGE, Outcome.UNMAPPED)


def test_of_a_dead_process_every_page_is_gone() -> None:
    with ChildGuest(4) as guest:
        assert guest.uffd.copy(guest.at(0), address_of(CONTENT), PAGE) == (PAGE, Outcome.INSTALLED)
        assert bytes.fromhex(guest.ask("read", 0)) == CONTENT[:16]
        guest.kill()

        assert guest.uffd.copy(guest.at(1), address_of(CONTENT), PAGE) == (0, Outcome.GONE)
        assert guest.uffd.zero(guest.at(1), PAGE) == (0, Outcome.GONE)
        assert guest.uffd.poison(guest.at(1), PAGE) == (0, Outcome.GONE)
        assert guest.uffd.resolve_minor(guest.at(1), PAGE) == (0, Outcome.GONE)


def test_of_a_dead_process_no_range_can_be_registered_or_let_go() -> None:
    with ChildGuest(4) as guest:
        guest.kill()

        with pytest.raises(FerryError) as gone:
            guest.uffd.unregister(guest.at(0), 4 * PAGE)
        assert gone.value.reason is Reason.VMM_GONE
        with pytest.raises(FerryError) as gone:
            guest.uffd.register(guest.at(0), 4 * PAGE)
        assert gone.value.reason is Reason.VMM_GONE
        assert guest.uffd.read_events() == []
        guest.uffd.wake(guest.at(0), PAGE)


def test_who_touches_a_poisoned_page_is_killed_by_a_bus_error() -> None:
    with ChildGuest(2, abi.UFFD_FEATURE_POISON) as guest:
        guest.tell("read", 1)
        wait_events(guest.uffd)

        assert guest.uffd.poison(guest.at(1), PAGE) == (PAGE, Outcome.INSTALLED)
        assert guest.process.wait(DEADLINE) == -signal.SIGBUS


def test_over_a_poisoned_page_only_content_can_be_installed(watch: Watch) -> None:
    watched = watch(2)
    assert watched.uffd.poison(watched.at(0), 2 * PAGE) == (2 * PAGE, Outcome.INSTALLED)

    assert watched.uffd.poison(watched.at(1), PAGE) == (0, Outcome.EXISTS)
    assert watched.zero(1) == (0, Outcome.EXISTS)
    assert watched.copy(1, CONTENT) == (PAGE, Outcome.INSTALLED)
    assert watched.memory.read(PAGE, 8) == CONTENT[:8]
