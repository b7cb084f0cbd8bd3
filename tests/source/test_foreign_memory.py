"""A VMM that names memory which is not its own: the sidecar may open it, and does not lend it that right."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from held_memory import DATA, PAGE

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.core.layout import Layout, Region
from pageferryd.source.memory import SourceMemory

pytestmark = pytest.mark.root
NOBODY = 65534
Vmm = Callable[..., int]


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    """Start a process without any right, that has inherited some descriptors; return its id."""
    children: list[subprocess.Popen[bytes]] = []

    def start(*fds: int) -> int:
        child = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, pass_fds=fds, user=NOBODY, group=NOBODY, extra_groups=()
        )
        children.append(child)
        return child.pid

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """What only root may read."""
    path = tmp_path / "shadow"
    path.write_bytes(b"root:secret:" * PAGE)
    path.chmod(0o600)
    return path


def in_file(path: Path) -> memory_pb2.MemoryLocation:
    return memory_pb2.MemoryLocation(file=memory_pb2.FileMemory(path=str(path)))


def in_fd(number: int) -> memory_pb2.MemoryLocation:
    return memory_pb2.MemoryLocation(memfd=memory_pb2.MemfdMemory(fd=number))


def opened(location: memory_pb2.MemoryLocation, pid: int) -> SourceMemory:
    return SourceMemory.open(Layout([Region(0, PAGE)]), [location], pid)


def refused(location: memory_pb2.MemoryLocation, pid: int) -> str:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FerryError) as caught:
        opened(location, pid).close()
    assert caught.value.reason is Reason.MEMORY_NOT_ITS_OWN
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    return caught.value.message


def test_a_file_that_the_vmm_only_names_is_not_read(vmm: Vmm, secret: Path) -> None:
    pid = vmm()
    message = refused(in_file(secret), pid)
    assert str(secret) in message
    assert str(pid) in message


def test_a_link_to_such_a_file_is_not_followed_to_it(vmm: Vmm, secret: Path, tmp_path: Path) -> None:
    link = tmp_path / "memory"
    link.symlink_to(secret)
    refused(in_file(link), vmm())


def test_the_memory_file_of_another_guest_is_not_this_ones(vmm: Vmm, secret: Path) -> None:
    fd = os.open(secret, os.O_RDWR)
    other = vmm(fd)
    os.close(fd)
    refused(in_file(secret), vmm())
    opened(in_file(secret), other).close()


def test_neither_is_it_by_the_way_through_a_process_that_has_it(vmm: Vmm, secret: Path) -> None:
    with secret.open() as file:
        refused(in_file(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")), vmm())


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY])
def test_a_descriptor_that_may_not_read_gives_no_right_to_read(vmm: Vmm, secret: Path, flags: int) -> None:
    """Anybody may open anything with O_PATH; opened anew through /proc by root, it would be readable."""
    fd = os.open(secret, flags)
    try:
        pid = vmm(fd)
        refused(in_fd(fd), pid)
        refused(in_file(secret), pid)
        refused(in_file(Path(f"/proc/{pid}/fd/{fd}")), pid)
    finally:
        os.close(fd)


def test_a_file_that_took_the_name_of_the_vmms_own_is_not_read(vmm: Vmm, secret: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(DATA.encode() * PAGE)
    fd = os.open(path, os.O_RDWR)
    pid = vmm(fd)
    os.close(fd)
    with_its_own = opened(in_file(path), pid)
    secret.replace(path)
    refused(in_file(path), pid)
    # What was opened before is what it was.
    assert b"".join(bytes(part) for part in with_its_own.collect(0, 1, PAGE).data) == DATA.encode() * PAGE
    with_its_own.close()


def test_what_the_vmm_reads_itself_is_its_own(vmm: Vmm, secret: Path) -> None:
    fd = os.open(secret, os.O_RDONLY)
    pid = vmm(fd)
    for location in (in_file(secret), in_fd(fd)):
        opened(location, pid).close()
    os.close(fd)
