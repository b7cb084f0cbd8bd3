"""Whose memory a userfaultfd watches, as far as the kernel lets it be seen; looking fills no page."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from watched import Watched

from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing, GuestMemory
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.linux.userfaultfd import Userfaultfd
from pageferryd.linux.watched_memory import watched_in, watches

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]
SIZE = 16 * PAGE_SIZE


@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.SHMEM])
def test_watched_memory_is_seen_to_be_and_no_page_of_it_comes_to_be(backing: Backing) -> None:
    memory = GuestMemory(SIZE, backing)
    uffd = Userfaultfd.open()
    try:
        assert not watched_in(os.getpid(), [(memory.address, SIZE)])
        assert not watches(uffd.fileno(), memory.address, PAGE_SIZE)
        uffd.register(memory.address, SIZE)
        assert watched_in(os.getpid(), [(memory.address, SIZE)])
        for page in (0, 7, 15):
            assert watches(uffd.fileno(), memory.address + page * PAGE_SIZE, PAGE_SIZE)
        # Filling succeeds only where nothing is.
        assert uffd.zero(memory.address, SIZE)[0] == SIZE
        # And what is there stays.
        assert watches(uffd.fileno(), memory.address, PAGE_SIZE)
        assert memory.read(0, SIZE) == bytes(SIZE)
    finally:
        uffd.close()
        memory.close()


def test_half_of_a_region_is_not_all_of_it() -> None:
    memory = GuestMemory(SIZE)
    uffd = Userfaultfd.open()
    try:
        uffd.register(memory.address, SIZE // 2)
        assert watched_in(os.getpid(), [(memory.address, SIZE // 2)])
        assert not watched_in(os.getpid(), [(memory.address, SIZE)])
        assert not watched_in(os.getpid(), [(memory.address + SIZE // 2, SIZE // 2)])
        assert not watches(uffd.fileno(), memory.address + SIZE - PAGE_SIZE, PAGE_SIZE)
    finally:
        uffd.close()
        memory.close()


def test_a_region_may_lie_in_several_mappings(watch: Callable[..., Watched]) -> None:
    first = watch(8)
    ranges = [(first.at(0), 4 * PAGE_SIZE), (first.at(4), 4 * PAGE_SIZE)]
    first.memory.advise(2 * PAGE_SIZE, 2 * PAGE_SIZE, 16)  # MADV_DONTDUMP makes a mapping of its own
    assert watched_in(os.getpid(), [(first.at(0), 8 * PAGE_SIZE)])
    assert watched_in(os.getpid(), ranges)


def test_a_userfaultfd_of_a_process_that_has_ended_watches_nothing() -> None:
    """A child makes one, registers memory at an address that we have watched too, and leaves the descriptor to us."""
    script = (
        "import sys, os, socket, array\n"
        "from pageferry.vmm.memory import GuestMemory\n"
        "m = GuestMemory(65536)\n"
        "u = m.open_userfault()\n"
        "s = socket.socket(fileno=int(sys.argv[1]))\n"
        "socket.send_fds(s, [str(m.address).encode()], [u])\n"
        "sys.stdin.read()\n"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.PIPE
        )
        try:
            data, fds, _, _ = socket.recv_fds(ours, 64, 1)
            address = int(data)
            assert watches(fds[0], address, PAGE_SIZE)
            assert watched_in(child.pid, [(address, 65536)])
            assert not watched_in(os.getpid(), [(address, 65536)])
        finally:
            child.communicate(timeout=10)
        assert not watches(fds[0], address, PAGE_SIZE)
        os.close(fds[0])
    with pytest.raises(FerryError) as gone:
        watched_in(child.pid, [(address, 65536)])
    assert gone.value.reason is Reason.VMM_GONE
