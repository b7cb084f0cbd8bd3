"""A session whose source is lost, silent or wrong: it pauses with the reason, and goes on with the next good one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from arriving import Arriving, expected, of
from guarded import Guarded
from queue_lanes import QueueLanes

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Lane
from pageferryd.core.runs import RAW, Run, decode, encode

pytestmark = pytest.mark.userfaultfd
Arrive = Callable[..., Arriving]


@pytest.fixture
async def arrive(guard: Callable[..., Guarded]) -> AsyncIterator[Arrive]:
    made: list[Arriving] = []

    def make(*sizes: int, silence: float = 10.0, push: bool = True) -> Arriving:
        made.append(Arriving(guard(*sizes), silence=silence, push=push))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_after_a_cut_exactly_what_is_missing_is_asked_for(arrive: Arrive) -> None:
    guest = arrive(1000)
    came = 0

    def cut_in_the_middle(lane: Lane, message: bytes) -> bytes | None:
        nonlocal came
        came += 1
        if came == 3:
            guest.source.connections[-1].cut()
        # Behind a cut nothing arrives.
        return message if came < 3 or len(guest.source.connections) > 1 else None

    guest.source.spoil = cut_in_the_middle
    missing: list[set[int]] = []
    note = guest.session._paused

    def paused(error: FerryError | None) -> None:
        note(error)
        runs = guest.session.pager.map.missing_runs(0, 1000)
        missing.append({page for first, pages in runs for page in range(first, first + pages)})

    guest.session._paused = paused
    guest.start()
    await guest.done()

    assert guest.paused == [None, Reason.LANE_LOST, None]
    assert guest.session.reconnects == 2
    asked = [
        page
        for runs in guest.source.connections[1].pushes
        for first, pages in runs
        for page in range(first, first + pages)
    ]
    assert len(asked) == len(set(asked)) or guest.session.pager.counts.duplicate_pages == 0
    assert set(asked) == missing[-1]
    assert 0 < len(missing[-1]) < 1000
    await guest.check_all()


async def test_who_waits_through_a_cut_is_served_after_it(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.source.spoil = lambda _lane, _message: None
    guest.start()
    reading = guest.guarded.reading(31)
    async with asyncio.timeout(10):
        while not guest.source.connections or not guest.source.connections[0].fetches:  # noqa: ASYNC110
            await asyncio.sleep(0)
    guest.source.unreachable = FerryError(Reason.SOURCE_UNREACHABLE, "nobody answers")
    guest.source.connections[0].cut()
    await guest.until_paused(Reason.SOURCE_UNREACHABLE)
    assert not reading.done()
    another = guest.guarded.reading(12)

    guest.source.spoil = lambda _lane, message: message
    guest.source.unreachable = None
    assert await of(reading) == expected(31)
    assert await of(another) == expected(12)


@pytest.mark.parametrize("reason", [Reason.TOKEN_INVALID, Reason.UNKNOWN_MIGRATION, Reason.LAYOUT_MISMATCH])
async def test_a_source_that_refuses_pauses_it_with_that_reason(arrive: Arrive, reason: Reason) -> None:
    guest = arrive(64)
    guest.source.unreachable = FerryError(reason, "no")
    guest.start()
    await guest.until_paused(reason)
    guest.source.unreachable = None
    guest.session.reconnect_now()
    await guest.done()
    await guest.check_all()


@pytest.mark.parametrize("reason", [Reason.VMM_GONE, Reason.INTERNAL, Reason.USERFAULTFD_REFUSED])
async def test_what_fails_at_the_source_is_not_taken_for_a_failure_here(arrive: Arrive, reason: Reason) -> None:
    guest = arrive(64)
    guest.source.unreachable = FerryError(reason, "at the source")
    guest.start()
    await guest.until_paused(reason)
    assert guest.running is not None
    assert not guest.running.done()
    guest.source.unreachable = None
    await guest.done()
    await guest.check_all()


async def test_a_source_whose_vmm_has_ended_does_not_end_the_session(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.start()
    await guest.until_paused(None)
    guest.source.connections[0].cut(Reason.VMM_GONE)
    await guest.until_paused(Reason.VMM_GONE)
    assert await guest.read(3) == expected(3)


def another_page(message: bytes) -> bytes:
    runs = decode(message).runs
    return encode([Run(runs[0].first + 1, 1, RAW)], [bytes(PAGE_SIZE)], last=True)


def page_outside(_message: bytes) -> bytes:
    return encode([Run(1 << 40, 1, RAW)], [bytes(PAGE_SIZE)], last=True)


def short_page(message: bytes) -> bytes:
    return message.replace(encode([], [], last=True), b"")[:-100]


WRONG: dict[str, tuple[Callable[[bytes], bytes], Reason]] = {
    "another page": (another_page, Reason.UNREQUESTED_PAGES),
    "a page outside": (page_outside, Reason.UNREQUESTED_PAGES),
    "a short page": (short_page, Reason.MALFORMED_PAGES),
    "noise": (lambda _message: b"\xff" * 50, Reason.MALFORMED_PAGES),
    "an end without pages": (lambda _message: encode([], [], last=True), Reason.UNREQUESTED_PAGES),
}


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_answer_pauses_it_with_its_reason_and_places_nothing(
    arrive: Arrive, case: str, lane: Lane
) -> None:
    guest = arrive(64, push=lane is Lane.PUSH)
    wrong, reason = WRONG[case]
    spoiled = 0

    def spoil(on: Lane, message: bytes) -> bytes:
        nonlocal spoiled
        if on is lane and not spoiled:
            spoiled += 1
            return wrong(message)
        return message

    guest.source.spoil = spoil
    guest.start()
    reading = guest.guarded.reading(0)
    await guest.until_paused(reason)
    assert await of(reading) == expected(0)
    guest.session.set_pacing(PacingOptions())
    await guest.done()
    await guest.check_all()


async def test_the_same_answer_twice_is_refused(arrive: Arrive) -> None:
    guest = arrive(64, push=False)
    guest.start()
    first: list[bytes] = []

    def keep(_lane: Lane, message: bytes) -> bytes:
        first.append(message)
        return message

    guest.source.spoil = keep
    assert await guest.read(5) == expected(5)
    guest.source.connections[0]._streams[Lane.DEMAND]._context.answers.put_nowait(first[0])
    await guest.until_paused(Reason.UNREQUESTED_PAGES)


@pytest.mark.parametrize("lane", list(Lane))
async def test_a_silent_lane_pauses_it_and_a_new_connection_recovers(arrive: Arrive, lane: Lane) -> None:
    guest = arrive(64, silence=0.05, push=lane is Lane.PUSH)
    guest.source.spoil = lambda on, message: None if on is lane else message
    guest.start()
    reading = guest.guarded.reading(7) if lane is Lane.DEMAND else None
    await guest.until_paused(Reason.LANE_SILENT)
    guest.source.spoil = lambda _lane, message: message
    if reading is not None:
        assert await of(reading) == expected(7)
        guest.session.set_pacing(PacingOptions())
    await guest.done()
    await guest.check_all()


async def test_a_completion_that_is_lost_is_said_again(arrive: Arrive) -> None:
    guest = arrive(64)
    guest.source.refuse_completion = FerryError(Reason.LANE_LOST, "the answer was lost")
    guest.start()
    await guest.until_paused(Reason.LANE_LOST)
    assert guest.source.completions == 0
    guest.source.refuse_completion = None
    await guest.done()
    assert guest.source.completions == 1
    # Nothing was fetched again.
    assert sum(guest.source.served.pages.values()) == 64
    await guest.check_all()


async def test_many_cuts_lose_and_repeat_nothing(arrive: Arrive) -> None:
    guest = arrive(400, 200)
    answers = 0

    def cut_now_and_then(_lane: Lane, message: bytes) -> bytes | None:
        nonlocal answers
        answers += 1
        if answers % 4 == 0 and answers < 80:
            guest.source.connections[-1].cut()
            return None
        return message

    guest.source.spoil = cut_now_and_then
    guest.start()
    readings = [(page, guest.guarded.reading(page)) for page in range(0, 600, 40)]
    for page, reading in readings:
        assert await of(reading) == expected(page)
    await guest.done()
    assert guest.source.completions == 1
    await guest.check_all()


async def test_a_source_that_has_forgotten_a_guest_that_is_whole_is_not_waited_for(
    arrive: Arrive, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgotten(_lanes: QueueLanes, _pages: int) -> None:
        raise FerryError(Reason.UNKNOWN_MIGRATION, "evicted")

    monkeypatch.setattr(QueueLanes, "complete", forgotten)
    guest = arrive(64)
    guest.start()
    await guest.done()
    assert guest.session.pager.complete
    await guest.check_all()
