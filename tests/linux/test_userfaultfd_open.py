"""How a userfaultfd is made or taken over, and what is refused."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable

import pytest
from watched import EVENTS, Watched

from pageferry import userfaultfd
from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.userfaultfd import feature_names, new_userfaultfd, offered_features
from pageferryd.linux.userfaultfd import Userfaultfd

pytestmark = pytest.mark.userfaultfd
Watch = Callable[..., Watched]
UNKNOWN_FEATURE = 1 << 40


@pytest.fixture(params=["device", "system call"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "system call":
        monkeypatch.setattr(userfaultfd, "DEVICE", "/dev/there-is-no-such-device")


@pytest.mark.root
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("user_mode_only", [False, True])
def test_it_is_made_with_the_features_asked_for(user_mode_only: bool) -> None:
    with Userfaultfd.open(EVENTS, user_mode_only=user_mode_only) as uffd:
        assert uffd.features() == EVENTS
        assert not os.get_inheritable(uffd.fileno())
        assert not os.get_blocking(uffd.fileno())


def test_the_kernel_offers_what_pageferry_needs() -> None:
    offered = feature_names(offered_features())
    assert {"EVENT_REMOVE", "EVENT_UNMAP", "MISSING_SHMEM", "THREAD_ID"} <= set(offered)


def test_a_feature_that_the_kernel_lacks_is_refused_by_name() -> None:
    with pytest.raises(FerryError, match="lacks 1<<40;") as refused:
        Userfaultfd.open(EVENTS | UNKNOWN_FEATURE)
    assert refused.value.reason is Reason.USERFAULTFD_UNAVAILABLE


def test_features_have_their_names() -> None:
    asked = abi.UFFD_FEATURE_EVENT_FORK | abi.UFFD_FEATURE_POISON | UNKNOWN_FEATURE
    assert feature_names(asked) == ["EVENT_FORK", "POISON", "1<<40"]


def test_without_permission_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "DEVICE", "/dev/there-is-no-such-device")
    monkeypatch.setattr(userfaultfd, "_syscall", refusing(1))

    with pytest.raises(FerryError, match="CAP_SYS_PTRACE") as refused:
        Userfaultfd.open()
    assert refused.value.reason is Reason.PERMISSION_MISSING


def test_without_userfaultfd_in_the_kernel_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "DEVICE", "/dev/there-is-no-such-device")
    monkeypatch.setattr(userfaultfd, "_syscall", refusing(38))

    with pytest.raises(FerryError, match="CONFIG_USERFAULTFD") as refused:
        offered_features()
    assert refused.value.reason is Reason.USERFAULTFD_UNAVAILABLE


def refusing(number: int) -> Callable[[int, int], int]:
    def refuse(_call: int, _flags: int) -> int:
        userfaultfd.ctypes.set_errno(number)
        return -1

    return refuse


def test_one_that_was_handed_over_is_made_ready() -> None:
    original = Userfaultfd.open(EVENTS)
    os.set_inheritable(original.fileno(), True)
    os.set_blocking(original.fileno(), True)

    with Userfaultfd.adopt(original.fileno()) as adopted:
        assert adopted.features() == EVENTS
        assert not os.get_inheritable(adopted.fileno())
        assert adopted.read_events() == []


def not_a_userfaultfd(kind: str) -> int:
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(writing)
        return reading
    if kind == "socket":
        return socket.socket(socket.AF_UNIX).detach()
    if kind == "file":
        return os.open("/dev/null", os.O_RDWR)
    if kind == "memfd":
        return os.memfd_create("anon_inode:[userfaultfd]")
    return os.eventfd(0)


@pytest.mark.parametrize("kind", ["pipe", "socket", "file", "memfd", "eventfd"])
def test_another_kind_of_descriptor_is_refused_and_stays_the_callers(kind: str) -> None:
    fd = not_a_userfaultfd(kind)
    with pytest.raises(FerryError, match="no userfaultfd") as refused:
        Userfaultfd.adopt(fd)
    assert refused.value.reason is Reason.HANDOFF_NO_FD
    os.close(fd)


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    with pytest.raises(FerryError, match="not open") as refused:
        Userfaultfd.adopt(999_999)
    assert refused.value.reason is Reason.HANDOFF_NO_FD


def test_one_on_which_no_api_was_agreed_is_refused() -> None:
    fd = new_userfaultfd(user_mode_only=True)
    with pytest.raises(FerryError, match="UFFDIO_API") as refused:
        Userfaultfd.adopt(fd)
    assert refused.value.reason is Reason.HANDOFF_NO_FD
    os.close(fd)


def test_it_is_closed_once_however_often_close_is_called() -> None:
    uffd = Userfaultfd.open()
    fd = uffd.fileno()
    uffd.close()
    uffd.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.fcntl(fd, fcntl.F_GETFD)
