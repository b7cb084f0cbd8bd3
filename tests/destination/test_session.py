"""A session brings a guest's memory: every page is the source's, whatever the guest does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from arriving import ZERO_PAGE, Arriving, expected, of
from guarded import Guarded, content

from pageferry.errors import FerryError, Reason
from pageferry.vmm.memory import Backing
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.page_map import PageState
from pageferryd.core.pager import Lane

pytestmark = pytest.mark.userfaultfd
Arrive = Callable[..., Arriving]


@pytest.fixture
async def arrive(guard: Callable[..., Guarded]) -> AsyncIterator[Arrive]:
    made: list[Arriving] = []

    def make(*sizes: int, backing: Backing = Backing.ANONYMOUS, silence: float = 10.0, push: bool = True) -> Arriving:
        made.append(Arriving(guard(*sizes, backing=backing), silence=silence, push=push))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_every_page_arrives_while_threads_touch_some(arrive: Arrive, backing: Backing) -> None:
    guest = arrive(*((2, 1) if backing is Backing.HUGETLBFS else (500, 300)), backing=backing)
    guest.start()
    pages = [(37 * number) % guest.layout.page_count for number in range(40)]
    readings = [(page, guest.guarded.reading(page)) for page in pages]
    for page, reading in readings:
        assert await of(reading) == expected(page)
    await guest.done()

    assert guest.source.completions == 1
    assert guest.session.pager.complete
    assert sum(guest.session.arrivals.demand) + sum(guest.session.arrivals.push) == guest.layout.page_count
    assert guest.session.latencies.summaries()
    assert guest.session.reconnects == 1
    await guest.check_all()


async def test_before_the_guest_runs_faults_are_served_and_nothing_is_pushed(arrive: Arrive) -> None:
    guest = arrive(64)
    guest.start(push=False)
    assert await guest.read(9) == expected(9)
    assert await guest.read(8) == expected(8)
    (lanes,) = guest.source.connections
    assert lanes.pushes == []

    guest.session.start_push()
    await guest.done()
    await guest.check_all()


async def test_a_guest_that_does_not_run_yet_is_never_completed(arrive: Arrive) -> None:
    guest = arrive(4)
    guest.start(push=False)
    for page in range(4):
        assert await guest.read(page) == expected(page)
    assert guest.session.pager.complete
    assert guest.source.completions == 0
    assert guest.running is not None
    assert not guest.running.done()

    guest.session.start_push()
    await guest.done()
    assert guest.source.completions == 1


async def test_with_push_turned_off_pages_come_by_demand_alone_until_it_is_turned_on(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.start()
    for page in (5, 60):
        assert await guest.read(page) == expected(page)
    assert guest.source.connections[0].pushes == []
    assert guest.session.pager.map.missing == 62

    guest.session.set_pacing(PacingOptions())
    await guest.done()
    await guest.check_all()


async def test_a_page_given_away_while_it_is_under_way_is_zero(arrive: Arrive) -> None:
    guest = arrive(256)
    held: list[bytes] = []
    caught = asyncio.Event()

    def hold(lane: Lane, message: bytes) -> bytes | None:
        if lane is Lane.PUSH:
            held.append(message)
            caught.set()
            return None
        return message

    guest.source.spoil = hold
    guest.start()
    await asyncio.wait_for(caught.wait(), 10)
    # Its bytes have left the source, and are not here.
    await of(guest.guarded.discarding(8, 8))
    guest.source.spoil = lambda _lane, message: message
    stream = guest.source.connections[0]._streams[Lane.PUSH]
    for message in held:
        stream._context.answers.put_nowait(message)
    await guest.done()

    assert guest.session.pager.state(8) is PageState.DISCARDED
    await guest.session.close()
    guest.guarded.uffd.close()
    for page in range(8, 16):
        assert guest.guarded.read(page) == ZERO_PAGE
    assert guest.guarded.read(7) == expected(7)
    assert guest.guarded.read(16) == expected(16)


async def test_a_page_given_away_and_touched_again_is_zero_at_once_and_stays_what_the_guest_makes_of_it(
    arrive: Arrive,
) -> None:
    guest = arrive(64, push=False)
    guest.start()
    await of(guest.guarded.discarding(10, 2))
    assert await guest.read(10) == ZERO_PAGE
    await of(guest.guarded.writing(11, b"mine"))
    assert guest.source.connections[0].fetches == []

    guest.session.set_pacing(PacingOptions())
    await guest.done()
    assert (await guest.read(11))[:8] == b"mine\0\0\0\0"


async def test_what_the_guest_writes_stays_whatever_comes_later(arrive: Arrive) -> None:
    guest = arrive(200)
    guest.start()
    for page in (0, 150, 199):
        await of(guest.guarded.writing(page, b"mine"))
    await guest.done()
    for page in (0, 150, 199):
        assert await guest.read(page) == b"mine" + expected(page)[4:]


async def test_a_huge_page_comes_whole_by_demand(arrive: Arrive, huge_pages: None) -> None:
    guest = arrive(2, backing=Backing.HUGETLBFS, push=False)
    guest.start()
    assert await guest.read(512 + 300) == expected(512 + 300)
    assert await guest.read(512) == expected(512)
    assert guest.session.pager.map.missing == 512
    asked = [run for runs in guest.source.connections[0].fetches for run in runs]
    assert sum(pages for _, pages in asked) == 512


async def test_the_end_of_the_vmm_ends_the_session_with_that_reason(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.start()
    await guest.read(0)
    guest.session.fail(FerryError(Reason.VMM_GONE, "the VMM ended"))
    assert await guest.failed() is Reason.VMM_GONE
    assert guest.source.completions == 0


async def test_the_end_of_the_vmm_while_the_source_is_away_is_told_as_that(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.source.unreachable = FerryError(Reason.SOURCE_UNREACHABLE, "nobody answers")
    guest.start()
    await guest.until_paused(Reason.SOURCE_UNREACHABLE)
    guest.session.fail(FerryError(Reason.VMM_GONE, "the VMM ended"))
    assert await guest.failed() is Reason.VMM_GONE


async def test_a_failure_before_it_ran_is_told_when_it_runs(arrive: Arrive) -> None:
    guest = arrive(64)
    guest.session.fail(OSError("out of order"))
    guest.session.fail(FerryError(Reason.VMM_GONE, "too late to matter"))
    guest.start()
    assert await guest.failed() is Reason.INTERNAL


async def test_closed_it_leaves_missing_memory_guarded(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.start()
    await guest.read(3)
    assert guest.running is not None
    guest.running.cancel()
    await asyncio.gather(guest.running, return_exceptions=True)
    await guest.session.close()
    await guest.session.close()

    reading = guest.guarded.reading(7)
    await asyncio.to_thread(guest.guarded.wait_queued)
    assert not reading.done()
    assert guest.source.completions == 0
    # Who comes after it can still put the page there.
    page = content(7)
    from pageferryd.destination.uffd_installer import UffdInstaller

    UffdInstaller(guest.guarded.uffd, guest.guarded.addresses).raw(7, 1, page, 0)
    assert await of(reading) == page


async def test_all_that_is_asked_for_is_asked_for_once(arrive: Arrive) -> None:
    guest = arrive(700)
    guest.start()
    await guest.done()
    (lanes,) = guest.source.connections
    asked = [page for runs in lanes.pushes for first, pages in runs for page in range(first, first + pages)]
    served = sum(guest.source.served.pages.values())
    assert set(asked) == set(range(700))
    assert served == 700
    assert guest.session.pager.counts.duplicate_pages == 0
    assert guest.source.served.bytes["push"] == PAGE_SIZE * guest.source.served.pages["push", "raw"]
