"""The memory file installer over real files of each kind, with a userfaultfd and without."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded import DEADLINE, content, contents
from installer_conformance import InstallerConformance, WatchedConformance
from shared_guest import Kind, SharedGuest
from sharing_vmm import SharingVmm

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.handoff import HandoffListener
from pageferryd.destination.installer import Installer, Placed
from pageferryd.linux.userfaultfd import Fault

Make = Callable[..., SharedGuest]
HUGE_MARKS = [pytest.mark.hugetlb, pytest.mark.root]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[SharedGuest] = []

    def one(*sizes: int, kind: Kind = Kind.MEMFD, watched: bool = False) -> SharedGuest:
        made.append(SharedGuest(*sizes, kind=kind, watched=watched))
        return made[-1]

    yield one
    for guest in made:
        guest.close()


def kinds(*chosen: Kind) -> list[object]:
    marks = {Kind.MEMFD: [], Kind.HUGE_MEMFD: HUGE_MARKS, Kind.GUEST_MEMFD: [pytest.mark.kvm]}
    return [pytest.param(kind, marks=marks[kind], id=kind.value) for kind in chosen]


class TestMemoryFileAlone(InstallerConformance):
    """Passes what every installer must, for a guest whose vCPUs look at the bitmap."""

    @pytest.fixture(params=kinds(Kind.MEMFD, Kind.GUEST_MEMFD))
    def site(self, make: Make, request: pytest.FixtureRequest) -> SharedGuest:
        return make(2, 2, kind=request.param)


class ServedGuest:
    """A guest whose touches of placed pages go on as the session lets them: they may be minor faults first."""

    def __init__(self, guest: SharedGuest) -> None:
        self._guest = guest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guest, name)

    def reading(self, page: int) -> Served:
        return Served(self._guest, page)


class Served:
    """The read of a page: whoever waits for its result says that the page is placed."""

    def __init__(self, guest: SharedGuest, page: int) -> None:
        self._guest = guest
        self._page = page
        self._future = guest.reading(page)
        self.done = self._future.done

    def result(self, timeout: float = DEADLINE) -> bytes:
        deadline = time.monotonic() + timeout
        uffd = self._guest.uffd
        assert uffd is not None
        while not self._future.done() and time.monotonic() < deadline:
            if uffd.fileno() >= 0 and any(isinstance(event, Fault) for event in uffd.read_events()):
                self._guest.installer.touched_again(*self._guest.layout.granule(self._page))
        return self._future.result(0)


@pytest.mark.userfaultfd
class TestMemoryFileUnderUserfaultfd(WatchedConformance):
    """Passes what every installer with a userfaultfd must: the three-descriptor form."""

    @pytest.fixture(params=kinds(Kind.MEMFD, Kind.HUGE_MEMFD))
    def site(self, make: Make, request: pytest.FixtureRequest) -> ServedGuest:
        if request.param is Kind.HUGE_MEMFD:
            request.getfixturevalue("huge_pages")
        return ServedGuest(make(2, 2, kind=request.param, watched=True))

    @pytest.fixture
    async def doomed(self, short_dir: Path) -> AsyncIterator[Installer]:
        """An installer whose VMM has ended."""
        path = short_dir / "handoff.sock"
        vmm = await SharingVmm.start(path, 4)
        listener = HandoffListener(path, Layout([Region(0, 4 * PAGE_SIZE)]), vmm.pid)
        try:
            await vmm.tell("go")
            handoff = await listener.receive(DEADLINE)
        finally:
            listener.close()
            await vmm.kill()
        yield handoff.installer()
        handoff.close()


# The bits


@pytest.fixture(params=kinds(Kind.MEMFD, Kind.GUEST_MEMFD))
def guest(make: Make, request: pytest.FixtureRequest) -> SharedGuest:
    return make(70, 130, kind=request.param)


def faulting(guest: SharedGuest) -> list[int]:
    return [page for page in range(guest.layout.page_count) if guest.bits.is_set(page)]


def test_only_bits_of_placed_pages_are_cleared(guest: SharedGuest) -> None:
    guest.installer.raw(60, 20, contents(60, 20), 0)
    guest.installer.zero(100, 30)
    assert faulting(guest) == [*range(60), *range(80, 100), *range(130, 200)]


def test_a_bit_is_clear_only_when_the_bytes_are_there(guest: SharedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    clear = guest.bitmap.clear

    def look_first(first: int, pages: int) -> None:
        seen.append(guest._read(first))
        clear(first, pages)

    monkeypatch.setattr(guest.bitmap, "clear", look_first)
    guest.installer.raw(5, 1, content(5), 0)
    assert seen == [content(5)]


def test_a_poisoned_page_faults_for_ever_even_when_the_pager_has_gone(guest: SharedGuest) -> None:
    guest.installer.poison(3, 2)
    guest.installer.raw(0, 3, contents(0, 3), 0)
    guest.installer.zero(5, 195)
    guest.bits.set_all()
    guest.installer.release()
    assert faulting(guest) == [3, 4]


def test_a_poisoned_page_that_the_guest_gave_away_is_zero_and_faults_no_more(guest: SharedGuest) -> None:
    guest.installer.poison(3, 2)
    guest.installer.zero(3, 1)
    guest.installer.release()
    assert faulting(guest) == [4]


def test_pages_that_the_guest_gave_away_read_as_zero(guest: SharedGuest) -> None:
    guest.installer.raw(0, 3, contents(0, 3), 0)
    guest.installer.given_away(1, 1)
    guest.installer.zero(1, 1)
    assert [guest.reading(page).result(DEADLINE) for page in range(3)] == [content(0), bytes(PAGE_SIZE), content(2)]


def test_bits_that_a_vmm_set_once_more_are_cleared_when_touched_and_in_the_end(guest: SharedGuest) -> None:
    guest.installer.raw(0, 200, contents(0, 200), 0)
    guest.bits.set_all()
    assert guest.installer.touched_again(9, 1) == (0, Placed.PRESENT)
    assert faulting(guest) == [*range(9), *range(10, 200)]
    guest.installer.release()
    assert faulting(guest) == []
    assert guest._read(77) == content(77)


def test_memory_that_cannot_be_written_keeps_its_bit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = make(4)

    def full(*_arguments: object) -> int:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FerryError) as failed:
        guest.installer.raw(0, 1, content(0), 0)
    assert failed.value.reason is Reason.NO_SPACE
    assert faulting(guest) == [0, 1, 2, 3]


def test_a_vmm_that_cuts_its_memory_short_harms_nobody_else(make: Make) -> None:
    guest = make(4)
    os.ftruncate(guest.fd, 0)
    assert guest.installer.raw(1, 2, contents(1, 2), 0) == (2, Placed.DONE)
    guest.installer.zero(0, 1)
    guest.installer.release()


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
def test_behind_the_exit_door_a_huge_page_comes_in_small_pieces(make: Make) -> None:
    guest = make(1, 1, kind=Kind.HUGE_MEMFD)
    assert guest.installer.raw(300, 1, content(300), 0) == (1, Placed.DONE)
    assert guest.reading(300).result(DEADLINE) == content(300)
    assert faulting(guest) == [*range(300), *range(301, 1024)]


# With a userfaultfd as well


@pytest.fixture
def watched(make: Make) -> SharedGuest:
    return make(200, watched=True)


def until_read(guest: SharedGuest, page: int) -> bytes:
    """Read a page that is placed."""
    return Served(guest, page).result()


@pytest.mark.userfaultfd
def test_a_touch_of_a_page_that_came_in_a_run_finds_it_in_the_file(watched: SharedGuest) -> None:
    watched.installer.raw(0, 100, contents(0, 100), 0)
    for page in (0, 57, 99):
        assert until_read(watched, page) == content(page)


@pytest.mark.userfaultfd
def test_a_touch_of_zeroes_that_came_in_a_run_ends_and_takes_no_memory_before(watched: SharedGuest) -> None:
    watched.installer.zero(0, 100)
    assert os.fstat(watched.fd).st_blocks == 0
    for page in (0, 99):
        assert until_read(watched, page) == bytes(PAGE_SIZE)
    assert os.fstat(watched.fd).st_blocks * 512 == 2 * PAGE_SIZE


@pytest.mark.userfaultfd
def test_zeroes_for_a_page_that_is_in_the_file_let_its_reader_go_on(watched: SharedGuest) -> None:
    # As after a discard of which only the mapping went: it is a minor fault for ever, unless the page is mapped.
    os.pwrite(watched.fd, content(8), 8 * PAGE_SIZE)
    reading = watched.reading(8)
    watched.wait_queued()
    watched.drain()
    watched.installer.zero(8, 1)
    assert reading.result(DEADLINE) == content(8)


@pytest.mark.userfaultfd
def test_pages_that_the_vmm_dropped_without_a_word_are_told_as_zero(watched: SharedGuest) -> None:
    watched.installer.raw(4, 1, content(4), 0)
    watched.memory_of_the_vmm_punched(4)
    assert watched.installer.touched_again(4, 1) == (1, Placed.DONE)
    assert watched.reading(4).result(DEADLINE) == bytes(PAGE_SIZE)


@pytest.mark.userfaultfd
def test_a_page_placed_while_an_event_waits_is_read_once_the_event_was(watched: SharedGuest) -> None:
    discarding = watched.discarding(0)
    watched.wait_queued()
    assert watched.installer.raw(1, 1, content(1), 0) == (1, Placed.DONE)
    watched.drain()
    discarding.result(DEADLINE)
    assert until_read(watched, 1) == content(1)


@pytest.mark.userfaultfd
def test_what_was_placed_before_its_discard_was_seen_is_zero_after_it(watched: SharedGuest) -> None:
    discarding = watched.discarding(0)
    watched.wait_queued()
    watched.installer.raw(0, 1, content(0), 0)
    watched.drain()
    discarding.result(DEADLINE)
    assert until_read(watched, 0) == bytes(PAGE_SIZE)


@pytest.mark.userfaultfd
def test_poison_waits_for_events_to_be_read(watched: SharedGuest) -> None:
    discarding = watched.discarding(0)
    watched.wait_queued()
    assert watched.installer.poison(1, 2) == (0, Placed.RETRY)
    watched.drain()
    discarding.result(DEADLINE)
    while watched.installer.poison(1, 2) == (0, Placed.RETRY):
        watched.drain()
    assert watched.bitmap.is_set(1)
