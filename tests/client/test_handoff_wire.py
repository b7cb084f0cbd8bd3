"""The hand-off as a pager sees it: one message of JSON and a descriptor, to the byte, on a socket that stays open."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_pager import copy_page, read_fault, receive_handoff

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm import Backing, GuestMemory, HandoffRegion, PagerLink, send_handoff

REGIONS = [HandoffRegion(0x7F0000000000, 1 << 20, 0), HandoffRegion(0x7F1000000000, 2 << 20, 1 << 20, 2 << 20)]


@pytest.fixture
def listener(short_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short_path / "pager.sock"))
        listening.listen(1)
        yield listening


@pytest.fixture
def any_fd() -> Iterator[int]:
    """A descriptor that stands for a userfaultfd: the wire does not care."""
    reading, writing = os.pipe()
    os.close(writing)
    yield reading
    os.close(reading)


def test_one_message_carries_the_table_and_the_descriptor(listener: socket.socket, any_fd: int) -> None:
    kept = send_handoff(listener.getsockname(), any_fd, REGIONS)
    connection, data, descriptors = receive_handoff(listener)

    with kept, connection:
        assert data == (
            b'[{"base_host_virt_addr":139637976727552,"size":1048576,"offset":0,"page_size":4096,"page_size_kib":4096},'
            b'{"base_host_virt_addr":139706696204288,"size":2097152,"offset":1048576,"page_size":2097152,'
            b'"page_size_kib":2097152}]'
        )
        (received,) = descriptors
        assert os.path.sameopenfile(received, any_fd)
        os.close(received)


def test_nothing_follows_and_the_socket_stays_open(listener: socket.socket, any_fd: int) -> None:
    kept = send_handoff(listener.getsockname(), any_fd, REGIONS)
    connection, _, (received,) = receive_handoff(listener)
    os.close(received)

    with connection:
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        kept.close()
        connection.setblocking(True)
        assert connection.recv(1) == b""


def test_a_hand_off_without_regions_is_refused(listener: socket.socket, any_fd: int) -> None:
    with pytest.raises(FerryError) as refused:
        send_handoff(listener.getsockname(), any_fd, [])

    assert refused.value.reason is Reason.HANDOFF_REGIONS


@pytest.mark.parametrize("name", ["nobody.sock", "x" * 200], ids=["nobody listens", "too long a path"])
def test_a_pager_that_cannot_be_reached_is_named(short_path: Path, any_fd: int, name: str) -> None:
    with pytest.raises(FerryError, match="cannot hand memory over to the pager at") as failed:
        send_handoff(str(short_path / name), any_fd, REGIONS)

    assert failed.value.reason is Reason.VMM_FAILED


def test_a_pager_that_does_not_accept_is_waited_for_only_so_long(short_path: Path, any_fd: int) -> None:
    path = str(short_path / "busy.sock")
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(path)
        busy.listen(0)
        # A backlog of 0 takes one connection, which nobody accepts.
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)

        with pytest.raises(FerryError) as failed:
            send_handoff(path, any_fd, REGIONS, timeout=0.1)

    assert failed.value.reason is Reason.HANDOFF_TIMEOUT


@pytest.mark.root
@pytest.mark.userfaultfd
@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.SHMEM])
def test_the_descriptor_is_a_userfaultfd_over_all_of_the_memory(listener: socket.socket, backing: Backing) -> None:
    memory = GuestMemory(8 * 4096, backing)
    link = PagerLink.open(listener.getsockname(), memory, user_mode_only=False)
    connection, data, (uffd,) = receive_handoff(listener)
    (region,) = json.loads(data)
    assert (region["base_host_virt_addr"], region["size"]) == (memory.address, memory.size)
    assert fcntl.fcntl(uffd, fcntl.F_GETFL) & os.O_NONBLOCK

    for offset in range(0, memory.size, 4096):
        assert copy_page(uffd, memory.address + offset, bytes([offset >> 12]) * 4096)
    os.close(uffd)
    connection.close()

    assert memory.read(7 * 4096, 4096) == b"\x07" * 4096
    link.close()
    link.close()
    memory.close()


@pytest.mark.root
@pytest.mark.userfaultfd
def test_an_access_by_the_kernel_waits_for_its_page_too(listener: socket.socket) -> None:
    memory = GuestMemory(4096)
    link = PagerLink.open(listener.getsockname(), memory, user_mode_only=False)
    connection, _, (uffd,) = receive_handoff(listener)
    reading, writing = os.pipe()
    # write(2) by ctypes: it lets go of the GIL, and the kernel reads guest memory for it.
    write = threading.Thread(target=lambda: ctypes.CDLL(None).write(writing, ctypes.c_void_p(memory.address), 4096))
    write.start()
    assert select.select([uffd], [], [], 20)[0]
    assert read_fault(uffd) == memory.address
    assert copy_page(uffd, memory.address, b"k" * 4096)
    write.join(20)

    assert os.read(reading, 4097) == b"k" * 4096
    os.close(reading)
    os.close(writing)
    os.close(uffd)
    connection.close()
    link.close()
    memory.close()


@pytest.mark.root
@pytest.mark.userfaultfd
def test_after_a_failed_hand_off_the_memory_can_be_handed_over_again(listener: socket.socket, short_path: Path) -> None:
    memory = GuestMemory(4096)
    with pytest.raises(FerryError):
        PagerLink.open(str(short_path / "nobody.sock"), memory)

    link = PagerLink.open(listener.getsockname(), memory)
    connection, _, (uffd,) = receive_handoff(listener)

    assert copy_page(uffd, memory.address, b"p" * 4096)
    assert memory.read(0, 1) == b"p"
    os.close(uffd)
    connection.close()
    link.close()
    memory.close()


@pytest.mark.root
@pytest.mark.userfaultfd
def test_the_kernel_reports_what_the_guest_discards(listener: socket.socket) -> None:
    memory = GuestMemory(4 * 4096)
    link = PagerLink.open(listener.getsockname(), memory)
    connection, _, (uffd,) = receive_handoff(listener)
    assert copy_page(uffd, memory.address + 4096, b"d" * 4096)
    # Blocks until the event is read.
    thread = threading.Thread(target=memory.discard, args=(4096, 8192))
    thread.start()
    os.set_blocking(uffd, True)

    event, start, end, _ = abi.MSG.unpack(os.read(uffd, abi.UFFD_MSG_SIZE))
    thread.join(20)

    assert (event, start, end) == (abi.UFFD_EVENT_REMOVE, memory.address + 4096, memory.address + 3 * 4096)
    os.close(uffd)
    connection.close()
    link.close()
    memory.close()
