"""What installers do: a subclass gives the fixture `site`, and `doomed` where a userfaultfd is part of it."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Protocol

import pytest
from guarded import contents

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout
from pageferryd.destination.installer import Installer, Placed

DEADLINE = 10.0


class Site(Protocol):
    """A guest with two regions of two granules each, all missing, and its installer."""

    installer: Installer
    layout: Layout
    granule: int
    """Pages that are installed together."""

    def reading(self, page: int) -> Future[bytes]:
        """Read all of a page in the guest, which waits until it is there."""

    def address_of(self, page: int) -> int:
        """Where the page lies in this process."""

    def discarding(self, page: int) -> Future[None]:
        """Give the granule of a page away in the guest, which waits for `drain`."""

    def wait_queued(self) -> None:
        """Wait until there is an event to be read."""

    def drain(self) -> None:
        """Read the events that are queued."""

    def unmap(self, page: int) -> None:
        """Take the granule of a page out of the guest's memory, and read the event of it."""

    def is_let_go(self) -> bool:
        """Say whether the installer holds nothing of the guest any more."""


def until_done(site: Site, first: int, pages: int, data: bytes) -> None:
    """Install, and drain as often as the kernel asks for it."""
    while (how := site.installer.raw(first, pages, data, 0))[1] is Placed.RETRY:
        site.drain()
    assert how == (pages, Placed.DONE)


class InstallerConformance:
    def test_pages_are_placed_as_they_are_and_who_waits_goes_on(self, site: Site) -> None:
        size = site.granule
        reading = site.reading(size - 1)
        site.wait_queued()
        assert not reading.done()

        assert site.installer.raw(0, size, contents(0, size), 0) == (size, Placed.DONE)
        assert reading.result(DEADLINE) == contents(size - 1, 1)
        assert site.reading(0).result(DEADLINE) == contents(0, 1)

    def test_the_bytes_begin_at_the_offset(self, site: Site) -> None:
        size = site.granule
        data = b"head of a message" + contents(size, size)
        assert site.installer.raw(size, size, data, 17) == (size, Placed.DONE)
        assert site.reading(size).result(DEADLINE) == contents(size, 1)

    def test_a_run_may_cross_from_one_region_to_the_next(self, site: Site) -> None:
        size = site.granule
        data = contents(size, 2 * size)
        assert site.installer.raw(size, 2 * size, data, 0) == (2 * size, Placed.DONE)
        assert site.reading(2 * size).result(DEADLINE) == contents(2 * size, 1)
        assert site.reading(2 * size - 1).result(DEADLINE) == contents(2 * size - 1, 1)

    def test_zeroes_are_placed_over_regions_and_who_waits_goes_on(self, site: Site) -> None:
        size = site.granule
        reading = site.reading(3 * size)
        site.wait_queued()
        assert site.installer.zero(0, 4 * size) == (4 * size, Placed.DONE)
        assert reading.result(DEADLINE) == bytes(PAGE_SIZE)

    def test_pages_that_are_touched_again_stay_as_they_are(self, site: Site) -> None:
        size = site.granule
        site.installer.raw(size, size, contents(size, size), 0)
        assert site.installer.touched_again(size, size) == (0, Placed.PRESENT)
        assert site.reading(size).result(DEADLINE) == contents(size, 1)

    def test_released_memory_is_the_guests_alone(self, site: Site) -> None:
        size = site.granule
        site.installer.raw(0, 4 * size, contents(0, 4 * size), 0)
        site.installer.release()
        assert site.is_let_go()
        # Nobody has to read an event of it any more.
        site.discarding(0).result(DEADLINE)
        assert site.reading(0).result(DEADLINE) == bytes(PAGE_SIZE)
        assert site.reading(4 * size - 1).result(DEADLINE) == contents(4 * size - 1, 1)

    def test_abandoned_memory_is_let_go(self, site: Site) -> None:
        site.installer.abandon()
        assert site.is_let_go()

    def test_zeroes_never_take_the_place_of_a_page_that_is_there(self, site: Site) -> None:
        size = site.granule
        site.installer.raw(2 * size, size, contents(2 * size, size), 0)
        site.installer.zero(2 * size, size)
        site.installer.zero(0, 4 * size)
        assert site.reading(2 * size).result(DEADLINE) == contents(2 * size, 1)


class WatchedConformance(InstallerConformance):
    """Where a userfaultfd watches the guest's memory as well; the fixture `doomed` has a VMM that ended."""

    def test_a_poisoned_page_cannot_be_read(self, site: Site) -> None:
        size = site.granule
        assert site.installer.poison(size, 2 * size) == (2 * size, Placed.DONE)
        with open("/proc/self/mem", "rb", 0) as memory:
            for page in (size, 3 * size - 1):
                with pytest.raises(OSError, match="error"):
                    os.pread(memory.fileno(), 1, site.address_of(page))

    def test_wake_lets_who_waits_look_again_and_fills_nothing(self, site: Site) -> None:
        reading = site.reading(0)
        site.wait_queued()
        site.drain()
        site.installer.wake(0, site.granule)
        # It looked, found nothing, and waits again.
        site.wait_queued()
        assert not reading.done()
        until_done(site, 0, site.granule, contents(0, site.granule))
        assert reading.result(DEADLINE) == contents(0, 1)

    async def test_a_vmm_that_has_ended_is_told_from_anything_else(self, doomed: Installer) -> None:
        for install in (lambda: doomed.raw(0, 1, bytes(PAGE_SIZE), 0), lambda: doomed.zero(1, 1)):
            with pytest.raises(FerryError) as gone:
                install()
            assert gone.value.reason is Reason.VMM_GONE
        doomed.abandon()


class CarefulConformance(WatchedConformance):
    """Where the kernel tells what is there already."""

    def test_a_page_that_is_there_stays_as_it_is_and_stops_the_run(self, site: Site) -> None:
        size = site.granule
        site.installer.raw(size, size, contents(size, size), 0)
        other = bytes(b"x" * (3 * size * PAGE_SIZE))

        assert site.installer.raw(0, 3 * size, other, 0) == (size, Placed.PRESENT)
        assert site.installer.raw(size, size, other, 0) == (0, Placed.PRESENT)
        assert site.installer.zero(size, size) == (0, Placed.PRESENT)
        assert site.installer.poison(size, size)[0] == 0
        assert site.reading(size).result(DEADLINE) == contents(size, 1)

    def test_zeroes_stop_at_a_page_that_is_there(self, site: Site) -> None:
        size = site.granule
        site.installer.raw(2 * size, size, contents(2 * size, size), 0)
        assert site.installer.zero(0, 4 * size) == (2 * size, Placed.PRESENT)
        assert site.reading(2 * size).result(DEADLINE) == contents(2 * size, 1)

    def test_while_events_are_queued_nothing_is_placed(self, site: Site) -> None:
        size = site.granule
        discarding = site.discarding(0)
        site.wait_queued()
        assert site.installer.raw(0, size, contents(0, size), 0) == (0, Placed.RETRY)
        assert site.installer.zero(size, size) == (0, Placed.RETRY)

        site.drain()
        discarding.result(DEADLINE)
        until_done(site, size, size, contents(size, size))

    def test_memory_that_is_not_there_any_more_stops_the_run(self, site: Site) -> None:
        size = site.granule
        site.unmap(size)
        assert site.installer.raw(0, 2 * size, contents(0, 2 * size), 0) == (size, Placed.UNMAPPED)
        assert site.installer.zero(size, size) == (0, Placed.UNMAPPED)
        assert site.reading(0).result(DEADLINE) == contents(0, 1)
