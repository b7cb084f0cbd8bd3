"""A guest whose pages are damaged on the way: they are fetched again, and nothing else is ever put in place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from arriving import Arriving, expected, of
from guarded import DEADLINE, Guarded

from pageferry.errors import Reason
from pageferry.vmm.memory import Backing
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Lane
from pageferryd.core.runs import WITH_BYTES, decode, encode, raw_pages
from pageferryd.destination.damage import MOST_IN_A_ROW

pytestmark = pytest.mark.userfaultfd
Arrive = Callable[..., Arriving]


@pytest.fixture
async def arrive(guard: Callable[..., Guarded]) -> AsyncIterator[Arrive]:
    made: list[Arriving] = []

    def make(*sizes: int, push: bool = True, backing: Backing = Backing.ANONYMOUS) -> Arriving:
        made.append(Arriving(guard(*sizes, backing=backing), push=push, checksums=True))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def with_flipped_bit(message: bytes, page: int, bit: int = 0) -> bytes:
    """Flip a bit of a page, if the message has its bytes."""
    batch = decode(message, checksums=True)
    at = batch.offset
    for run in batch.runs:
        if run.kind not in WITH_BYTES:
            continue
        if run.first <= page < run.first + run.pages:
            changed = bytearray(message)
            changed[at + (page - run.first) * PAGE_SIZE + bit // 8] ^= 1 << bit % 8
            return bytes(changed)
        at += run.pages * PAGE_SIZE
    return message


def all_damaged(message: bytes) -> bytes:
    """Flip a bit of every page's bytes."""
    batch = decode(message, checksums=True)
    changed = bytearray(message)
    for page in range(raw_pages(batch.runs)):
        changed[batch.offset + page * PAGE_SIZE + 17] ^= 0x20
    return bytes(changed)


def once(page: int, bit: int) -> Callable[[Lane, bytes], bytes]:
    """Damage a page the first time it is sent."""
    hit = False

    def spoil(_lane: Lane, message: bytes) -> bytes:
        nonlocal hit
        changed = message if hit else with_flipped_bit(message, page, bit)
        hit = hit or changed != message
        return changed

    return spoil


async def test_a_page_damaged_once_is_fetched_again_by_push(arrive: Arrive) -> None:
    guest = arrive(300, 100)
    guest.source.spoil = once(215, 8 * 4000 + 3)
    guest.start()
    await guest.done()
    assert guest.paused == [None]
    assert guest.session.placer.checksum_mismatches == 1
    await guest.check_all()


@pytest.mark.parametrize("push", [True, False])
async def test_a_page_that_a_guest_waits_for_is_fetched_again_at_once(arrive: Arrive, push: bool) -> None:
    guest = arrive(64, push=push)
    guest.source.spoil = once(31, 1)
    guest.start(push=push)
    assert await guest.read(31) == expected(31)
    guest.session.set_pacing(PacingOptions())
    guest.session.start_push()
    await guest.done()
    assert guest.paused == [None]
    assert guest.session.placer.checksum_mismatches == 1
    await guest.check_all()


async def test_pages_damaged_now_and_then_come_whole_on_one_connection(arrive: Arrive) -> None:
    guest = arrive(600)
    left = set(range(0, 600, 9))

    def spoil(_lane: Lane, message: bytes) -> bytes:
        for run in decode(message, checksums=True).runs:
            for page in left.intersection(range(run.first, run.first + run.pages)):
                left.remove(page)
                message = with_flipped_bit(message, page, page)
        return message

    guest.source.spoil = spoil
    guest.start()
    readings = [(page, guest.guarded.reading(page)) for page in range(0, 600, 15)]
    for page, reading in readings:
        assert await of(reading) == expected(page)
    await guest.done()
    assert guest.paused == [None]
    # What the other lane brought whole before is not looked at.
    raw = [page for page in range(0, 600, 9) if any(expected(page))]
    assert 0 < guest.session.placer.checksum_mismatches <= len(raw)
    await guest.check_all()


async def test_constant_damage_pauses_the_guest_until_it_stops(arrive: Arrive) -> None:
    guest = arrive(200)
    guest.source.spoil = lambda _lane, message: all_damaged(message)
    guest.start()
    reading = guest.guarded.reading(50)
    async with asyncio.timeout(DEADLINE):
        while guest.paused.count(Reason.PAGES_DAMAGED) < 3:
            guest._changed.clear()
            await guest._changed.wait()
    assert not reading.done()
    assert set(guest.paused) == {None, Reason.PAGES_DAMAGED}
    mismatches = guest.session.placer.checksum_mismatches
    assert mismatches >= 3 * MOST_IN_A_ROW
    # Of raw pages none was put in place.
    assert guest.session.placer.pages["demand", "raw"] == guest.session.placer.pages["push", "raw"] == 0

    guest.source.spoil = lambda _lane, message: message
    assert await of(reading) == expected(50)
    await guest.done()
    await guest.check_all()


async def test_a_page_that_is_always_damaged_pauses_the_guest_and_no_other_page_waits_for_it(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.source.spoil = lambda _lane, message: with_flipped_bit(message, 8, 100)
    guest.start()
    reading = guest.guarded.reading(8)
    await guest.until_paused(Reason.PAGES_DAMAGED)
    asked = [runs for lanes in guest.source.connections[:1] for runs in lanes.fetches if runs == ((8, 1),)]
    assert len(asked) in (MOST_IN_A_ROW, MOST_IN_A_ROW + 1)
    assert await guest.read(20) == expected(20)
    assert not reading.done()

    guest.source.spoil = lambda _lane, message: message
    assert await of(reading) == expected(8)


@pytest.mark.parametrize("lane", list(Lane))
async def test_pages_without_their_checksums_are_refused(arrive: Arrive, lane: Lane) -> None:
    guest = arrive(64, push=lane is Lane.PUSH)

    def stripped(on: Lane, message: bytes) -> bytes:
        batch = decode(message, checksums=True)
        pages = raw_pages(batch.runs)
        if on is not lane or not pages:
            return message
        end = batch.offset + pages * PAGE_SIZE
        return encode(batch.runs, [message[batch.offset : end]], last=batch.last)

    guest.source.spoil = stripped
    guest.start()
    reading = guest.guarded.reading(0) if lane is Lane.DEMAND else None
    await guest.until_paused(Reason.MALFORMED_PAGES)
    assert guest.session.placer.pages["demand", "raw"] == guest.session.placer.pages["push", "raw"] == 0
    guest.source.spoil = lambda _lane, message: message
    if reading is not None:
        assert await of(reading) == expected(0)
    guest.session.set_pacing(PacingOptions())
    await guest.done()
    await guest.check_all()


@pytest.mark.hugetlb
@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("push", [True, False])
async def test_a_huge_page_with_one_damaged_page_comes_whole(arrive: Arrive, push: bool) -> None:
    guest = arrive(2, push=push, backing=Backing.HUGETLBFS)
    placer = guest.session.placer

    def until_seen(_lane: Lane, message: bytes) -> bytes:
        return message if placer.checksum_mismatches else with_flipped_bit(message, 306, 8 * 11)

    guest.source.spoil = until_seen
    guest.start(push=push)
    # Any page of it waits for all of it.
    assert await guest.read(3) == expected(3)
    assert placer.checksum_mismatches >= 1
    guest.session.set_pacing(PacingOptions())
    guest.session.start_push()
    await guest.done()
    assert guest.paused == [None]
    await guest.check_all()
