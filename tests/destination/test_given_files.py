"""Memory files given to a VMM: what is written into them, what stays a hole, and who closes them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from guarded import DEADLINE, content, contents
from installer_conformance import InstallerConformance

from pageferry.errors import FerryError, Reason
from pageferry.vmm.mapping import MappedMemory
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.files_installer import FilesInstaller
from pageferryd.destination.given_files import GivenMemory
from pageferryd.destination.installer import Placed
from pageferryd.linux.memory_file import MemoryFile

Files = Callable[[], Counter[str]]
BEFORE = 3 * PAGE_SIZE
"""Where the second region begins in its file."""


def memory_file(size: int) -> int:
    fd = os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


class Telling(FilesInstaller):
    """Tells who waits, as the session tells the door."""

    def __init__(self, layout: Layout, files: list[tuple[MemoryFile, int]]) -> None:
        super().__init__(layout, files)
        self.placed: set[int] = set()
        self.changed = threading.Condition()

    def raw(self, first: int, pages: int, data: bytes, offset: int) -> tuple[int, Placed]:
        return self._told(first, super().raw(first, pages, data, offset))

    def zero(self, first: int, pages: int) -> tuple[int, Placed]:
        return self._told(first, super().zero(first, pages))

    def _told(self, first: int, outcome: tuple[int, Placed]) -> tuple[int, Placed]:
        with self.changed:
            self.placed.update(range(first, first + outcome[0]))
            self.changed.notify_all()
        return outcome


class GivenSite:
    """Two regions of two pages, each in a file of its own, and a VMM that has mapped both."""

    granule = 1

    def __init__(self) -> None:
        self.layout = Layout([Region(0, 2 * PAGE_SIZE), Region(1 << 32, 2 * PAGE_SIZE)])
        sizes = 2 * PAGE_SIZE, BEFORE + 2 * PAGE_SIZE
        self._fds = [memory_file(size) for size in sizes]
        self._maps = [MappedMemory(size, fd) for size, fd in zip(sizes, self._fds, strict=True)]
        self._files = [MemoryFile(os.dup(fd), size) for size, fd in zip(sizes, self._fds, strict=True)]
        self.installer = Telling(self.layout, list(zip(self._files, (0, BEFORE), strict=True)))
        self._threads = ThreadPoolExecutor(4)
        self._ended = False

    def _at(self, page: int) -> tuple[int, int]:
        piece = next(self.layout.pieces(page, 1))
        return piece.region, (0, BEFORE)[piece.region] + piece.first * PAGE_SIZE

    def reading(self, page: int) -> Future[bytes]:
        return self._threads.submit(self._read, page)

    def _read(self, page: int) -> bytes:
        told = self.installer
        with told.changed:
            assert told.changed.wait_for(lambda: page in told.placed or self._ended, DEADLINE)
        region, at = self._at(page)
        return self._maps[region].read(at, PAGE_SIZE)

    def discarding(self, page: int) -> Future[None]:
        return self._threads.submit(self.punch, page)

    def punch(self, page: int) -> None:
        """Make a hole as a balloon does, through the VMM's own descriptor."""
        region, at = self._at(page)
        file = MemoryFile(os.dup(self._fds[region]), at + PAGE_SIZE)
        file.punch(at, PAGE_SIZE)
        file.close()

    def present(self) -> list[int]:
        """How many pages each file has; what was allocated and never written counts too."""
        return [os.fstat(fd).st_blocks * 512 // PAGE_SIZE for fd in self._fds]

    def wait_queued(self) -> None: ...

    def drain(self) -> None: ...

    def is_let_go(self) -> bool:
        return all(file._fd < 0 for file in self._files)

    def close(self) -> None:
        with self.installer.changed:
            self._ended = True
            self.installer.changed.notify_all()
        self._threads.shutdown()
        self.installer.abandon()
        for mapping in self._maps:
            mapping.close()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def site() -> Iterator[GivenSite]:
    made = GivenSite()
    yield made
    made.close()


class TestFilesInstaller(InstallerConformance):
    """Passes what every installer must."""


def test_zeroes_stay_holes_until_they_are_made_present(site: GivenSite) -> None:
    site.installer.raw(1, 1, contents(1, 1), 0)
    assert site.installer.zero(0, 4) == (4, Placed.DONE)
    assert site.present() == [1, 0]

    site.installer.make_present(0, 3)
    assert site.present() == [2, 1]
    assert site._read(1) == content(1)
    assert site._read(2) == bytes(PAGE_SIZE)


def test_a_page_that_the_vmm_punched_out_is_zero_from_then_on(site: GivenSite) -> None:
    site.installer.raw(0, 4, contents(0, 4), 0)
    site.punch(2)
    assert site.present() == [2, 1]
    assert site.installer.touched_again(2, 1) == (0, Placed.PRESENT)
    site.installer.make_present(2, 1)
    assert site.present() == [2, 2]
    assert site._read(2) == bytes(PAGE_SIZE)
    assert site._read(3) == content(3)


def test_pages_that_were_given_away_are_holes_again(site: GivenSite) -> None:
    site.installer.raw(0, 4, contents(0, 4), 0)
    site.installer.given_away(1, 2)
    assert site.present() == [1, 1]
    assert site._read(3) == content(3)


def test_a_poisoned_page_stays_a_hole(site: GivenSite) -> None:
    assert site.installer.poison(1, 2) == (2, Placed.DONE)
    assert site.present() == [0, 0]


def test_where_memory_runs_out_the_rest_is_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout([Region(0, 200 * PAGE_SIZE)])
    file = MemoryFile(memory_file(200 * PAGE_SIZE), 200 * PAGE_SIZE)
    installer = FilesInstaller(layout, [(file, 0)])
    write = MemoryFile.write

    def little(self: MemoryFile, offset: int, data: bytes, start: int, length: int) -> None:
        if offset >= 100 * PAGE_SIZE:
            raise FerryError(Reason.NO_SPACE, "no memory")
        write(self, offset, data, start, length)

    monkeypatch.setattr(MemoryFile, "write", little)
    data = b"head" + contents(0, 200)
    done, how = installer.raw(0, 200, data, 4)
    assert how is Placed.RETRY
    assert 0 < done < 200
    with pytest.raises(FerryError) as refused:
        installer.raw(150, 50, data, 4 + 150 * PAGE_SIZE)
    assert refused.value.reason is Reason.NO_SPACE

    monkeypatch.undo()
    assert installer.raw(done, 200 - done, data, 4 + done * PAGE_SIZE) == (200 - done, Placed.DONE)
    assert os.pread(file._fd, 200 * PAGE_SIZE, 0) == contents(0, 200)
    installer.release()


# What a driver gives


LAYOUT = Layout([Region(0, 2 * PAGE_SIZE), Region(1 << 32, 2 * PAGE_SIZE)])


@pytest.fixture
async def pair() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    yield ours, theirs
    ours.close()
    theirs.close()


Pair = tuple[socket.socket, socket.socket]


async def test_regions_may_lie_in_one_file(pair: Pair, open_files: Files) -> None:
    before = open_files()
    fd = memory_file(8 * PAGE_SIZE)
    kept = os.dup(fd)
    given = GivenMemory(LAYOUT, [(fd, PAGE_SIZE), (fd, 4 * PAGE_SIZE)], pair[0])
    installer = given.installer()
    installer.raw(0, 4, contents(0, 4), 0)
    assert os.pread(kept, 8 * PAGE_SIZE, 0) == b"".join(
        (bytes(PAGE_SIZE), contents(0, 2), bytes(PAGE_SIZE), contents(2, 2), bytes(2 * PAGE_SIZE))
    )
    assert list(given.spans()) == []
    assert given.connection is None
    given.close()
    given.close()
    os.close(kept)
    pair[1].close()
    after = open_files()
    assert after["socket"] == before["socket"] - 2
    assert after["/memfd"] == before["/memfd"]


async def test_it_is_finished_when_the_vmm_has_hung_up(pair: Pair) -> None:
    given = GivenMemory(LAYOUT, [(memory_file(2 * PAGE_SIZE), 0), (memory_file(2 * PAGE_SIZE), 0)], pair[0])
    exit_door, doors = given.doors()
    assert exit_door in doors
    door = next(door for door in doors if door.name == "offload")
    failures: list[Exception] = []
    door.open(lambda events: door.settled(events.faults[0], len(events.faults), None), failures.append)  # type: ignore[arg-type]
    for first in (0, 1 << 32):
        request = (9).to_bytes(8, "little") + (16).to_bytes(8, "little")
        pair[1].sendall(request + first.to_bytes(8, "little") + (2 * PAGE_SIZE).to_bytes(8, "little"))
    waiting = asyncio.create_task(given.finished())
    pair[1].setblocking(False)
    for _ in range(2):
        async with asyncio.timeout(DEADLINE):
            assert await asyncio.get_running_loop().sock_recv(pair[1], 16) == b"\1" + bytes(15)
    assert not waiting.done()
    pair[1].close()
    await asyncio.wait_for(waiting, DEADLINE)
    assert failures == []
    given.installer().release()
    given.let_go()
    assert pair[0].fileno() == -1


def short() -> int:
    return memory_file(PAGE_SIZE)


def fitting() -> int:
    return memory_file(2 * PAGE_SIZE)


def no_file() -> int:
    return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)


def read_only() -> int:
    fd = fitting()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


UNFIT = {
    "too few": (lambda: [(fitting(), 0)], Reason.HANDOFF_REGIONS),
    "too many": (lambda: [(fitting(), 0) for _ in range(3)], Reason.HANDOFF_REGIONS),
    "none": (list, Reason.HANDOFF_REGIONS),
    "too short": (lambda: [(fitting(), 0), (short(), 0)], Reason.HANDOFF_REGIONS),
    "too far in": (lambda: [(fitting(), PAGE_SIZE), (fitting(), 0)], Reason.HANDOFF_REGIONS),
    "between pages": (lambda: [(fitting(), 0), (fitting(), 100)], Reason.HANDOFF_REGIONS),
    "before the file": (lambda: [(fitting(), -PAGE_SIZE), (fitting(), 0)], Reason.HANDOFF_REGIONS),
    "no memory file": (lambda: [(fitting(), 0), (no_file(), 0)], Reason.HANDOFF_NO_FD),
    "not to be written": (lambda: [(read_only(), 0), (fitting(), 0)], Reason.HANDOFF_NO_FD),
}


@pytest.mark.parametrize(("make", "reason"), UNFIT.values(), ids=UNFIT.keys())
async def test_what_does_not_fit_is_refused_and_closed(
    pair: Pair, open_files: Files, make: Callable[[], list[tuple[int, int]]], reason: Reason
) -> None:
    before = open_files()
    with pytest.raises(FerryError) as refused:
        GivenMemory(LAYOUT, make(), pair[0])
    assert refused.value.reason is reason
    assert pair[0].fileno() == -1
    assert open_files() == before - Counter(["socket"])
