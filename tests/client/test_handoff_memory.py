"""The hand-off of memory whose vCPUs' faults come by exits: two or three descriptors, and regions with addresses."""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_pager import read_fault

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm import Backing, GuestMemfd, GuestMemory, HandoffRegion, PagerLink, UserfaultBitmap, send_handoff

PAGE = 4096


@pytest.fixture
def listener(short_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short_path / "pager.sock"))
        listening.listen(1)
        yield listening


def receive(listener: socket.socket) -> tuple[socket.socket, list[dict[str, int]], list[int]]:
    listener.settimeout(20)
    connection, _ = listener.accept()
    data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(8 * 4))
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload)
    return connection, json.loads(data), list(descriptors)


def memfd_as_guest_memfd(size: int) -> GuestMemfd:
    """A memfd in the place of a guest_memfd, which only KVM makes: the wire does not care."""
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, size)
    return GuestMemfd(memfd, size)


@pytest.mark.root
@pytest.mark.userfaultfd
def test_three_descriptors_are_the_userfaultfd_the_memory_and_its_bitmap(listener: socket.socket) -> None:
    memory, bitmap = GuestMemory(8 * PAGE, Backing.SHMEM), UserfaultBitmap(8)
    link = PagerLink.open(listener.getsockname(), memory, bitmap=bitmap, guest_address=1 << 32)
    connection, (region,), (uffd, memfd, bits) = receive(listener)

    with connection:
        assert str(Path(f"/proc/self/fd/{uffd}").readlink()) == "anon_inode:[userfaultfd]"
        assert os.path.sameopenfile(memfd, memory.memfd)
        assert os.path.sameopenfile(bits, bitmap.memfd)
        assert (region["gpa_start"], region["is_guest_memfd"], region["offset"]) == (1 << 32, False, 0)
    for fd in (uffd, memfd, bits):
        os.close(fd)
    link.close()
    memory.close()
    bitmap.close()


@pytest.mark.root
@pytest.mark.userfaultfd
def test_an_access_of_the_vmm_to_a_page_that_is_in_the_memfd_waits_for_the_pager_too(listener: socket.socket) -> None:
    memory, bitmap = GuestMemory(PAGE, Backing.SHMEM), UserfaultBitmap(1)
    link = PagerLink.open(listener.getsockname(), memory, bitmap=bitmap)
    connection, _, (uffd, memfd, bits) = receive(listener)
    os.pwrite(memfd, b"installed", 0)
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(memory.read(0, 9)))
    reader.start()
    assert select.select([uffd], [], [], 20)[0]
    assert read_fault(uffd) == memory.address
    assert not seen

    fcntl.ioctl(uffd, abi.UFFDIO_CONTINUE, bytearray(abi.CONTINUE.pack(memory.address, PAGE, 0, 0)))
    reader.join(20)

    assert seen == [b"installed"]
    connection.close()
    for fd in (uffd, memfd, bits):
        os.close(fd)
    link.close()
    memory.close()
    bitmap.close()


def test_anonymous_memory_cannot_be_handed_over_itself(listener: socket.socket) -> None:
    memory, bitmap = GuestMemory(PAGE), UserfaultBitmap(1)

    with pytest.raises(FerryError, match="no memfd") as refused:
        PagerLink.open(listener.getsockname(), memory, bitmap=bitmap)

    assert refused.value.reason is Reason.INVALID_ARGUMENT
    memory.close()
    bitmap.close()


def test_two_descriptors_are_the_memory_and_its_bitmap(listener: socket.socket) -> None:
    memory, bitmap = memfd_as_guest_memfd(8 * PAGE), UserfaultBitmap(8)
    link = PagerLink.open_without_userfault(listener.getsockname(), memory, bitmap)
    connection, table, (memfd, bits) = receive(listener)

    assert table == [
        {
            "base_host_virt_addr": memory.address,
            "size": 8 * PAGE,
            "offset": 0,
            "page_size": PAGE,
            "page_size_kib": PAGE,
            "gpa_start": 0,
            "is_guest_memfd": True,
        }
    ]
    assert os.pread(bits, 8, 0) == b"\xff" + bytes(7)
    os.pwrite(memfd, b"installed", 3 * PAGE)
    assert memory.read(3 * PAGE, 9) == b"installed"
    connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        connection.recv(1)
    link.close()
    link.close()
    connection.setblocking(True)
    assert connection.recv(1) == b""
    connection.close()
    for fd in (memfd, bits):
        os.close(fd)
    memory.close()
    bitmap.close()


def test_after_a_failed_hand_off_without_userfaultfd_it_can_be_tried_again(
    listener: socket.socket, short_path: Path
) -> None:
    memory, bitmap = memfd_as_guest_memfd(PAGE), UserfaultBitmap(1)
    with pytest.raises(FerryError):
        PagerLink.open_without_userfault(str(short_path / "nobody.sock"), memory, bitmap)

    link = PagerLink.open_without_userfault(listener.getsockname(), memory, bitmap)

    connection, _, descriptors = receive(listener)
    connection.close()
    for fd in descriptors:
        os.close(fd)
    link.close()
    memory.close()
    bitmap.close()


def test_memory_without_guest_addresses_is_refused(listener: socket.socket) -> None:
    with pytest.raises(FerryError, match="guest address") as refused:
        send_handoff(listener.getsockname(), [0, 1, 2], [HandoffRegion(0, PAGE, 0)])

    assert refused.value.reason is Reason.HANDOFF_REGIONS


def test_a_guest_memfd_is_read_and_written_as_any_guest_memory() -> None:
    memory = memfd_as_guest_memfd(4 * PAGE)
    memory.write(PAGE, b"here")

    assert memory.read(PAGE, 4) == b"here"
    assert memory.region(1 << 20).guest_address == 1 << 20
    assert memory.location(PAGE).address == memory.address + PAGE
    memory.discard(PAGE, PAGE)
    assert memory.read(PAGE, 4) == bytes(4)
    with pytest.raises(ValueError, match="whole pages"):
        memory.discard(1, PAGE)
    with pytest.raises(IndexError):
        memory.discard(0, 5 * PAGE)
    memory.close()
    memory.close()


def test_what_is_no_guest_memfd_is_refused_as_one() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(FerryError):
        GuestMemfd(reading, PAGE)

    with pytest.raises(FerryError, match="only KVM") as refused:
        GuestMemory(PAGE, Backing.GUEST_MEMFD)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
