"""What a guest does to its own memory is told before it happens."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from child_guest import ChildGuest
from watched import DEADLINE, EVENTS, PAGE, Watched, libc, page_of, wait_events

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing
from pageferryd.linux.buffers import address_of
from pageferryd.linux.userfault_events import parse_events
from pageferryd.linux.userfaultfd import Fault, Fork, Outcome, Remap, Remove, Unmap, Userfaultfd

pytestmark = pytest.mark.userfaultfd
Watch = Callable[..., Watched]
MREMAP_MAYMOVE = 1
MREMAP_DONTUNMAP = 4


def test_discarded_pages_are_told_and_are_missing_again(watch: Watch, backing: Backing) -> None:
    watched = watch(4, backing, EVENTS)
    watched.copy(0, page_of(b"old", 4 * watched.page))
    discarding = watched.doing(watched.memory.discard, watched.page, 2 * watched.page)

    assert wait_events(watched.uffd)[0] == Remove(watched.at(1), watched.at(3))
    discarding.result(DEADLINE)
    watched.uffd.read_events()

    reading = watched.reading(1)
    (fault,) = wait_events(watched.uffd)
    assert isinstance(fault, Fault)
    assert fault.address == watched.at(1)
    while watched.copy(1, bytes(watched.page))[1] is Outcome.RETRY:
        pass
    assert reading.result(DEADLINE) == bytes(16)


def test_unmapped_pages_are_told(watch: Watch) -> None:
    watched = watch(4, Backing.ANONYMOUS, EVENTS)
    unmapping = watched.doing(libc.munmap, watched.at(2), 2 * PAGE)

    assert wait_events(watched.uffd) == [Unmap(watched.at(2), watched.at(4))]
    assert unmapping.result(DEADLINE) == 0


def test_moved_pages_are_told_and_can_be_filled_in_their_new_place(watch: Watch) -> None:
    watched = watch(4, Backing.ANONYMOUS, EVENTS)
    # MREMAP_DONTUNMAP keeps the old range, so that nothing else comes to lie there before the test ends.
    flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP
    moving = watched.doing(libc.mremap, watched.at(0), 4 * PAGE, 4 * PAGE, flags, None)

    remap = wait_events(watched.uffd)[0]
    assert isinstance(remap, Remap)
    assert (remap.old, remap.length) == (watched.at(0), 4 * PAGE)
    while not moving.done():
        watched.uffd.read_events()
    assert moving.result(DEADLINE) == remap.new
    content = page_of(b"moved")
    while (done := watched.uffd.copy(remap.new, address_of(content), PAGE))[1] is Outcome.RETRY:
        watched.uffd.read_events()
    assert done == (PAGE, Outcome.INSTALLED)
    assert watched.doing(libc.munmap, remap.new, 4 * PAGE)
    assert wait_events(watched.uffd) == [Unmap(remap.new, remap.new + 4 * PAGE)]


@pytest.mark.root
def test_a_fork_comes_with_a_userfaultfd_for_the_childs_memory() -> None:
    with ChildGuest(2, abi.UFFD_FEATURE_EVENT_FORK) as guest:
        guest.tell("fork", 1)
        (fork,) = wait_events(guest.uffd)
        assert isinstance(fork, Fork)
        assert not os.get_inheritable(fork.fd)

        with Userfaultfd.adopt(fork.fd) as uffd_of_child:
            (fault,) = wait_events(uffd_of_child)
            assert isinstance(fault, Fault)
            assert fault.address == guest.at(1)
            content = page_of(b"for the child only ")
            assert uffd_of_child.copy(guest.at(1), address_of(content), PAGE) == (PAGE, Outcome.INSTALLED)
            assert bytes.fromhex(guest.answer()) == content[:16]

        assert guest.uffd.copy(guest.at(1), address_of(page_of(b"parent")), PAGE) == (PAGE, Outcome.INSTALLED)
        assert bytes.fromhex(guest.ask("read", 1)) == page_of(b"parent")[:16]


def test_without_waiting_events_nothing_is_read(watch: Watch) -> None:
    assert watch(1).uffd.read_events() == []


def test_an_event_of_an_unknown_kind_is_refused_loudly() -> None:
    with pytest.raises(FerryError, match="0x55") as refused:
        parse_events(abi.MSG.pack(0x55, 1, 2, 3))
    assert refused.value.reason is Reason.USERFAULTFD_REFUSED


def test_the_flags_of_a_fault_are_told_apart() -> None:
    flags = abi.UFFD_PAGEFAULT_FLAG_WRITE, abi.UFFD_PAGEFAULT_FLAG_WP, abi.UFFD_PAGEFAULT_FLAG_MINOR
    events = parse_events(b"".join(abi.MSG.pack(abi.UFFD_EVENT_PAGEFAULT, flag, PAGE, 7 | 9 << 32) for flag in flags))

    assert [(fault.write, fault.write_protect, fault.minor) for fault in events if isinstance(fault, Fault)] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert events[0] == Fault(PAGE, flags[0], 7)
