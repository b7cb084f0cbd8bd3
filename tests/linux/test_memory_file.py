"""A guest's memory is written through its file, and no VMM can do the writer harm by what it does to it."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from made_guest_memfd import MMAP, guest_memfd
from pageferry.errors import FerryError, Reason
from pageferryd.linux import memory_file
from pageferryd.linux.memory_file import MemoryFile, forbid_shrinking, is_guest_memfd, is_huge, is_memfd

PAGE = 4096
SIZE = 16 * PAGE
HUGE = 2 << 20
F_SEAL_FUTURE_WRITE = 0x10


def made(size: int = SIZE, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("guest", flags)
    os.ftruncate(fd, size)
    return fd


class Backed:
    """A memory file and the guest's own mapping of it."""

    def __init__(self, fd: int, size: int) -> None:
        self.mapping = mmap.mmap(fd, size)
        self.fd = os.dup(fd)
        self.size = size
        self.file = MemoryFile(fd, size)

    def close(self) -> None:
        self.file.close()
        os.close(self.fd)


@pytest.fixture(
    params=[
        "memfd",
        pytest.param("guest_memfd", marks=pytest.mark.kvm),
        pytest.param("a guest_memfd that the kernel cannot reach", marks=pytest.mark.kvm),
        pytest.param("hugetlbfs", marks=[pytest.mark.hugetlb, pytest.mark.root]),
    ]
)
def backed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backed]:
    if "guest_memfd" in request.param:
        if "cannot" in request.param:
            monkeypatch.setattr(memory_file, "_kernel_reaches", lambda _address: False)
        with guest_memfd(SIZE) as fd:
            one = Backed(os.dup(fd), SIZE)
            yield one
            one.close()
        return
    if request.param == "hugetlbfs":
        request.getfixturevalue("huge_pages")
        one = Backed(made(2 * HUGE, os.MFD_HUGETLB | os.MFD_HUGE_2MB), 2 * HUGE)
    else:
        one = Backed(made(), SIZE)
    yield one
    one.close()


def test_bytes_are_written_where_they_belong_and_nowhere_else(backed: Backed) -> None:
    data = b"head" + b"a" * PAGE + b"tail"
    backed.file.write(3 * PAGE, data, 4, PAGE)
    assert backed.mapping[2 * PAGE : 5 * PAGE] == bytes(PAGE) + b"a" * PAGE + bytes(PAGE)


def test_the_last_page_is_written_and_the_file_does_not_grow(backed: Backed) -> None:
    backed.file.write(backed.size - PAGE, b"z" * PAGE, 0, PAGE)
    assert backed.mapping[-PAGE:] == b"z" * PAGE
    assert os.fstat(backed.fd).st_size == backed.size


def test_filling_makes_zeroes_and_spares_what_is_there(backed: Backed) -> None:
    granule = HUGE if is_huge(backed.fd) else PAGE
    backed.file.write(PAGE, b"a" * PAGE, 0, PAGE)
    backed.file.fill(0, backed.size // granule * granule)
    assert backed.mapping[: 3 * PAGE] == bytes(PAGE) + b"a" * PAGE + bytes(PAGE)


def test_what_is_punched_reads_as_zeroes_and_may_be_written_again(backed: Backed) -> None:
    granule = HUGE if is_huge(backed.fd) else PAGE
    backed.file.write(0, b"a" * 2 * PAGE, 0, 2 * PAGE)
    backed.file.punch(0, granule)
    assert backed.mapping[:PAGE] == bytes(PAGE)
    backed.file.write(0, b"b" * PAGE, 0, PAGE)
    assert backed.mapping[:PAGE] == b"b" * PAGE


def test_closed_twice_it_lets_the_descriptor_go_once(backed: Backed) -> None:
    backed.file.close()
    backed.file.close()
    with pytest.raises(FerryError):
        backed.file.write(0, b"a", 0, 1)


# What a VMM may hand over, and do afterwards


def refused(fd: int, size: int = SIZE) -> Reason:
    with pytest.raises(FerryError) as refusal:
        MemoryFile(fd, size)
    # It is still the caller's.
    os.close(fd)
    return refusal.value.reason


def test_a_file_that_is_too_short_is_refused() -> None:
    assert refused(made(SIZE - 1)) is Reason.HANDOFF_REGIONS


def test_a_longer_file_will_do() -> None:
    MemoryFile(made(SIZE + PAGE), SIZE).close()


@pytest.mark.kvm
def test_a_guest_memfd_that_is_too_short_is_refused() -> None:
    with guest_memfd(SIZE) as fd:
        assert refused(os.dup(fd), SIZE + PAGE) is Reason.HANDOFF_REGIONS


@pytest.mark.kvm
def test_a_guest_memfd_that_cannot_be_mapped_is_refused() -> None:
    with guest_memfd(SIZE, 0) as fd:
        assert refused(os.dup(fd)) is Reason.HANDOFF_NO_FD


def test_what_is_no_memory_file_is_refused(tmp_path: Path) -> None:
    named_alike = tmp_path / "memfd:guest"
    named_alike.write_bytes(bytes(SIZE))
    here, there = socket.socketpair()
    others = [
        os.open(named_alike, os.O_RDWR),
        os.open("/dev/zero", os.O_RDWR),
        os.open(tmp_path, os.O_RDONLY),
        here.detach(),
        os.eventfd(0),
    ]
    there.close()
    assert {refused(fd) for fd in others} == {Reason.HANDOFF_NO_FD}


def test_a_file_that_only_bears_the_name_of_a_memfd_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # At the root of a VMM's own mount it would look like that from here, and might be FUSE.
    path = Path("/var/tmp" if tmp_path.stat().st_dev == Path("/dev/shm").stat().st_dev else tmp_path) / "file"
    path.write_bytes(bytes(SIZE))
    monkeypatch.setattr(memory_file, "_link", lambda _fd: "/memfd:guest (deleted)")
    if memory_file._seals(fd := os.open(path, os.O_RDWR)) is not None:
        os.close(fd)
        pytest.skip("the files of the tests lie on tmpfs, which has seals")
    path.unlink()
    assert refused(fd) is Reason.HANDOFF_NO_FD


def test_a_memfd_that_is_not_to_be_written_is_refused() -> None:
    fd = made()
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert refused(read_only) is Reason.HANDOFF_NO_FD
    for seal in (fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE):
        sealed = made()
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, seal)
        assert refused(sealed) is Reason.HANDOFF_NO_FD
    os.close(fd)


def test_a_memfd_that_is_sealed_later_is_the_vmms_failure_and_not_want_of_memory() -> None:
    one = Backed(made(), SIZE)
    fcntl.fcntl(one.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    with pytest.raises(FerryError) as failed:
        one.file.write(0, b"a" * PAGE, 0, PAGE)
    assert failed.value.reason is Reason.VMM_FAILED
    one.close()


def test_a_memfd_that_is_cut_short_does_the_writer_no_harm() -> None:
    one = Backed(made(), SIZE)
    os.ftruncate(one.fd, 0)
    one.file.write(5 * PAGE, b"a" * PAGE, 0, PAGE)
    one.file.fill(0, SIZE)
    one.file.punch(0, SIZE)
    one.close()


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
def test_a_memfd_of_huge_pages_that_is_cut_short_does_the_writer_no_harm() -> None:
    one = Backed(made(2 * HUGE, os.MFD_HUGETLB | os.MFD_HUGE_2MB), 2 * HUGE)
    os.ftruncate(one.fd, 0)
    with pytest.raises(FerryError) as failed:
        one.file.write(PAGE, b"a" * PAGE, 0, PAGE)
    assert failed.value.reason is Reason.VMM_FAILED
    one.close()


@pytest.mark.root
def test_huge_pages_that_were_not_reserved_are_refused() -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    size = (int(free.read_text()) + 1) * HUGE
    assert refused(made(size, os.MFD_HUGETLB | os.MFD_HUGE_2MB), size) is Reason.HANDOFF_NO_FD


def test_a_memfd_that_may_be_sealed_cannot_be_cut_short_any_more() -> None:
    fd = made()
    forbid_shrinking(fd)
    forbid_shrinking(fd)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_a_memfd_that_was_sealed_by_its_maker_will_do() -> None:
    fd = made()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    forbid_shrinking(fd)
    os.close(fd)


def test_a_memfd_that_may_not_be_sealed_is_refused_with_the_remedy() -> None:
    fd = made(flags=0)
    with pytest.raises(FerryError, match="MFD_ALLOW_SEALING") as refusal:
        forbid_shrinking(fd)
    assert refusal.value.reason is Reason.HANDOFF_REGIONS
    os.close(fd)


@pytest.mark.kvm
def test_memfd_and_guest_memfd_are_told_apart() -> None:
    memfd = made()
    with guest_memfd(SIZE, MMAP) as fd:
        assert (is_memfd(fd), is_guest_memfd(fd)) == (False, True)
    assert (is_memfd(memfd), is_guest_memfd(memfd)) == (True, False)
    os.close(memfd)
