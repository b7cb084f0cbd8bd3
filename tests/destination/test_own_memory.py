"""A hand-off of memory that is not the VMM's own is refused, and no page of it is touched."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guarded import DEADLINE, Guarded

from pageferry.errors import FerryError, Reason
from pageferry.vmm.handoff import HandoffRegion, send_handoff
from pageferry.vmm.memory import GuestMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.refusals import Refusal, Refusals
from pageferryd.destination.handoff import Handoff, HandoffListener
from pageferryd.linux.userfaultfd import Userfaultfd

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]
SIZE = 16 * PAGE_SIZE
LAYOUT = Layout([Region(0, SIZE)])

# Makes memory in one way, gives a userfaultfd of it to the parent, and waits.
NEIGHBOUR = """
import socket, sys
from pageferry.vmm.memory import GuestMemory
memory = GuestMemory(int(sys.argv[2]))
uffd = memory.open_userfault()
with socket.socket(fileno=int(sys.argv[1])) as to:
    socket.send_fds(to, [str(memory.address).encode()], [uffd])
sys.stdin.read()
"""

# Hands a memory file and its bitmap over when told to, and has closed them, or closed and mapped them, by then.
FILES = """
import os, sys
from pageferry.vmm.bitmap import UserfaultBitmap
from pageferry.vmm.handoff import HandoffRegion, send_handoff
from pageferry.vmm.memory import Backing, GuestMemory
path, size, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
memory = GuestMemory(size, Backing.SHMEM)
bitmap = UserfaultBitmap(size // 4096)
sys.stdin.readline()
regions = [HandoffRegion(memory.address, size, 0, gpa_start=0)]
given = [memory.memfd, bitmap.memfd]
if how == "gone":
    given = [os.memfd_create("m"), os.memfd_create("b", os.MFD_ALLOW_SEALING)]
    os.truncate(given[0], size)
    os.truncate(given[1], os.fstat(bitmap.memfd).st_size)
link = send_handoff(path, given, regions)
if how != "kept":
    for fd in given:
        os.close(fd)
print("sent", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture
def neighbour() -> Iterator[tuple[int, int]]:
    """A userfaultfd of another process's memory, and where that lies."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", NEIGHBOUR, str(theirs.fileno()), str(SIZE)]
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE)
        ours.settimeout(DEADLINE)
        data, fds, _, _ = socket.recv_fds(ours, 64, 1)
    yield fds[0], int(data)
    os.close(fds[0])
    child.kill()
    child.communicate()


async def hand_over(path: Path, fds: list[int], address: int, refusals: Refusals | None = None) -> Handoff:
    """Hand memory over as this process."""
    listener = HandoffListener(path, LAYOUT, os.getpid(), refusals)
    try:
        with send_handoff(str(path), fds, [HandoffRegion(address, SIZE, 0, gpa_start=0)]):
            return await listener.receive(DEADLINE)
    finally:
        listener.close()


async def refused(path: Path, fds: list[int], address: int, refusals: Refusals | None = None) -> str:
    with pytest.raises(FerryError) as caught:
        await hand_over(path, fds, address, refusals)
    assert caught.value.reason is Reason.MEMORY_NOT_ITS_OWN
    return caught.value.message


async def test_a_userfaultfd_of_another_processs_memory_is_refused(
    short_dir: Path, neighbour: tuple[int, int], open_files: Callable[[], object]
) -> None:
    before = open_files()
    await refused(short_dir / "handoff.sock", [neighbour[0]], neighbour[1])
    assert open_files() == before


async def test_neither_is_it_taken_for_memory_that_the_vmm_has_watched_otherwise(
    short_dir: Path, neighbour: tuple[int, int], guard: Callable[..., Guarded]
) -> None:
    mine = guard(16)
    message = await refused(short_dir / "handoff.sock", [neighbour[0]], mine.memories[0].address)
    assert "another process" in message
    # Nothing was put there.
    with Userfaultfd.adopt(os.dup(neighbour[0])) as theirs:
        assert theirs.zero(neighbour[1], SIZE)[0] == SIZE
    assert mine.uffd.zero(mine.memories[0].address, SIZE)[0] == SIZE


@pytest.mark.parametrize("watched", [0, SIZE // 2])
async def test_a_userfaultfd_that_does_not_watch_all_of_it_is_refused(short_dir: Path, watched: int) -> None:
    memory = GuestMemory(SIZE)
    with Userfaultfd.open() as uffd:
        if watched:
            uffd.register(memory.address, watched)
        await refused(short_dir / "handoff.sock", [uffd.fileno()], memory.address)
    memory.close()


async def test_a_refusal_is_counted_with_the_process_that_tried(short_dir: Path, neighbour: tuple[int, int]) -> None:
    told: list[Refusal] = []
    refusals = Refusals(lambda: 0.0, told.append)
    for _ in range(2):
        await refused(short_dir / "handoff.sock", [neighbour[0]], neighbour[1], refusals)
    assert refusals.counts == {("handoff", "MEMORY_NOT_ITS_OWN"): 2}
    assert [str(os.getpid()) in one.who for one in told] == [True]


async def test_a_vmm_that_ends_as_it_hands_over_is_gone_and_no_intruder(short_dir: Path) -> None:
    path = short_dir / "handoff.sock"
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", FILES, str(path), str(SIZE), "kept",
                                                 stdin=pipe, stdout=pipe)  # fmt: skip
    refusals = Refusals(lambda: 0.0, lambda _: None)
    listener = HandoffListener(path, LAYOUT, child.pid, refusals)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"\n")
        assert await child.stdout.readline() == b"sent\n"
        child.kill()
        await child.wait()
        with pytest.raises(FerryError) as caught:
            await listener.receive(DEADLINE)
        assert caught.value.reason is Reason.VMM_GONE
        assert refusals.counts == {}
    finally:
        listener.close()
        await child.wait()


@pytest.mark.parametrize("how", ["kept", "mapped", "gone"])
async def test_memory_files_must_be_open_or_mapped_in_the_vmm_that_hands_them_over(short_dir: Path, how: str) -> None:
    path = short_dir / "handoff.sock"
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FILES, str(path), str(SIZE), how]
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    listener = HandoffListener(path, LAYOUT, child.pid)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"\n")
        assert await child.stdout.readline() == b"sent\n"
        if how == "gone":
            with pytest.raises(FerryError, match="neither open nor mapped") as caught:
                await listener.receive(DEADLINE)
            assert caught.value.reason is Reason.MEMORY_NOT_ITS_OWN
        else:
            (await listener.receive(DEADLINE)).close()
    finally:
        listener.close()
        child.kill()
        await child.communicate()
