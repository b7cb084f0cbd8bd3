"""What another process is made to do to itself: its userfaultfd, its descriptors, its memory."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path

import pytest
from tracee import PAGE, READ, Child, until

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.userfaultfd import DEVICE
from pageferryd.linux.buffers import address_of
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.ptrace import Tracee, traced
from pageferryd.linux.remote_calls import close_descriptor, discard, make_userfaultfd
from pageferryd.linux.userfaultfd import Event, Fault, Outcome, Remove, Userfaultfd

pytestmark = [
    pytest.mark.root,
    pytest.mark.userfaultfd,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls are injected on x86-64 alone"),
]
ROOT, NOBODY = 0, 65534

SETTING = Path("/proc/sys/vm/unprivileged_userfaultfd")
only_where_restricted = pytest.mark.skipif(
    not SETTING.exists() or SETTING.read_text().strip() != "0" or not Path(DEVICE).exists(),
    reason=f"here every user may make a userfaultfd (vm.unprivileged_userfaultfd), or there is no {DEVICE}",
)


def taken(pid: int, number: int, features: int = 0) -> Userfaultfd:
    """Take a userfaultfd of another process over, and agree on its API."""
    with PidFd(pid) as process:
        fd = process.get_fd(number)
    fcntl.ioctl(fd, abi.UFFDIO_API, bytearray(abi.API.pack(abi.UFFD_API, features, 0)))
    return Userfaultfd.adopt(fd)


def nothing() -> None:
    pass


def test_a_process_makes_a_userfaultfd_through_which_its_memory_is_filled_from_outside() -> None:
    with Child("memory", 2, 0) as child:
        address = int(child.first)

        def empty(tracee: Tracee) -> Userfaultfd:
            uffd = taken(child.pid, make_userfaultfd(tracee))
            uffd.register(address, 2 * PAGE)
            discard(tracee, address, 2 * PAGE, nothing)
            return uffd

        with traced(child.pid, empty) as uffd:
            child.tell("what is there?")
            found: list[Event] = []
            until(lambda: bool(found.extend(uffd.read_events()) or found))
            assert isinstance(found[0], Fault)
            assert found[0].address == address
            for page in range(2):
                content = bytes([7 + page]) * PAGE
                assert uffd.copy(address + page * PAGE, address_of(content), PAGE) == (PAGE, Outcome.INSTALLED)
            assert child.answer() == "7 8"


def test_discarding_where_discards_are_told_waits_until_that_is_read() -> None:
    with Child("memory", 2, 0) as child:
        address = int(child.first)
        found: list[Event] = []

        def empty(tracee: Tracee) -> None:
            number = make_userfaultfd(tracee)
            with taken(child.pid, number, abi.UFFD_FEATURE_EVENT_REMOVE) as uffd:
                uffd.register(address, 2 * PAGE)
                discard(tracee, address, PAGE, lambda: found.extend(uffd.read_events()))
                uffd.unregister(address, 2 * PAGE)
            close_descriptor(tracee, number)

        traced(child.pid, empty)
        assert found == [Remove(address, address + PAGE)]
        assert child.ask("what is there?") == "0 1"


@pytest.mark.parametrize("locked", [False, True])
def test_locked_memory_is_discarded_too(locked: bool) -> None:
    with Child("memory", 3, int(locked)) as child:
        address = int(child.first)
        traced(child.pid, lambda tracee: discard(tracee, address + PAGE, PAGE, nothing))
        assert child.ask("what is there?") == "1 0 1"


def test_memory_that_is_not_there_cannot_be_discarded() -> None:
    with Child("read") as child:
        with pytest.raises(FerryError, match="could not drop 4096 bytes at 0x1000") as refused:
            traced(child.pid, lambda tracee: discard(tracee, PAGE, PAGE, nothing))
        assert refused.value.reason is Reason.VMM_FAILED
        assert child.ask("hello") == "6 0"


def test_a_descriptor_is_closed_and_then_is_not_there_to_close() -> None:
    with Child("read") as child:
        before = child.await_call(READ).descriptors()
        number = traced(child.pid, make_userfaultfd)
        assert child.descriptors() - before == {f"{number} anon_inode:[userfaultfd]"}

        traced(child.pid, lambda tracee: close_descriptor(tracee, number))
        assert child.descriptors() == before

        with pytest.raises(FerryError, match=f"descriptor {number}: Bad file descriptor") as refused:
            traced(child.pid, lambda tracee: close_descriptor(tracee, number))
        assert refused.value.reason is Reason.VMM_FAILED


@only_where_restricted
def test_where_the_call_is_refused_the_device_gives_a_userfaultfd_and_nothing_else_stays_open() -> None:
    with Child("without_privilege", ROOT, 2) as child:
        before = child.await_call(READ).descriptors()
        number = traced(child.pid, make_userfaultfd)
        assert child.descriptors() - before == {f"{number} anon_inode:[userfaultfd]"}
        flags = Path(f"/proc/{child.pid}/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
        assert int(flags, 8) & (os.O_NONBLOCK | os.O_CLOEXEC) == os.O_NONBLOCK | os.O_CLOEXEC
        assert child.ask("hello") == "6 0"


@only_where_restricted
def test_a_device_that_can_give_nothing_is_closed_again() -> None:
    with Child("without_privilege", ROOT, 1) as child:
        before = child.await_call(READ).descriptors()
        with pytest.raises(FerryError, match="Too many open files") as refused:
            traced(child.pid, make_userfaultfd)
        assert refused.value.reason is Reason.VMM_FAILED
        assert child.descriptors() == before
        assert child.ask("hello") == "6 0"


@only_where_restricted
def test_where_call_and_device_are_refused_it_says_what_gives_them() -> None:
    with Child("without_privilege", NOBODY, 2) as child:
        before = child.await_call(READ).descriptors()
        with pytest.raises(FerryError, match=r"/dev/userfaultfd.*CAP_SYS_PTRACE.*vm\.unprivileged") as refused:
            traced(child.pid, make_userfaultfd)
        assert refused.value.reason is Reason.PERMISSION_MISSING
        assert child.descriptors() == before
        assert child.ask("hello") == "6 0"
