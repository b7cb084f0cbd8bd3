"""Wires that fail, each in its way: it is noticed, the session pauses and comes back, and every byte is right."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from guarded import content
from wire_hosts import LOSSES, NOTICED, PAGES, PATIENCE, SILENCE, Hosts, of
from wire_proxy import Way, Wire, WireProxy

from pageferry.errors import Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import PacingOptions

pytestmark = pytest.mark.userfaultfd
MIDDLE = PAGES * PAGE_SIZE // 4
DEMAND, PUSH = 0, 1


@pytest.fixture(params=["sockets", "grpc"])
async def hosts(request: pytest.FixtureRequest) -> AsyncIterator[Hosts]:
    with WireProxy() as wire:
        made = Hosts(wire, request.param)
        await made.start()
        yield made
        await made.stop()


async def test_a_whole_wire_brings_every_page_once(hosts: Hosts) -> None:
    guest = hosts.arrive(silence=PATIENCE)
    await guest.is_whole()
    assert guest.paused == [None]
    assert sum(hosts.source.served.pages.values()) == PAGES
    assert hosts.source.completions == 1


async def test_a_cut_is_noticed_and_what_had_come_is_not_asked_for_again(hosts: Hosts) -> None:
    guest = hosts.arrive(push=False)
    for page in (3, 700):
        # A reset throws away what has been forwarded and not been read, which may be all of it.
        assert await of(guest.guarded.reading(page)) == content(page)
    cutting = hosts.wire.when_forwarded(MIDDLE, hosts.wire.cut)
    guest.session.set_pacing(PacingOptions())
    await guest.until_lost(cutting, *LOSSES)
    # Counts from nought: lanes that are lost may yet count what they had sent before.
    again = hosts.source.offers()
    hosts.wire.heal()
    await guest.is_whole()
    assert sum(again.pages.values()) == guest.missing[-1] <= PAGES - 2
    assert guest.session.pager.counts.duplicate_pages == 0


@pytest.mark.parametrize("way", list(Way))
async def test_a_clean_end_of_one_direction_is_a_loss_and_no_completion(hosts: Hosts, way: Way) -> None:
    hosts.wire.when_forwarded(MIDDLE, lambda: hosts.wire.hang_up(way))
    guest = hosts.arrive()
    await guest.until_paused(*NOTICED)
    assert hosts.source.completions == 0
    await guest.is_whole()
    assert hosts.source.completions == 1


@pytest.mark.parametrize("wire", [Wire.SWALLOWS, Wire.HOLDS, Wire.DRIPS])
@pytest.mark.parametrize("ways", [(Way.DOWN,), (Way.UP,), tuple(Way)], ids=["pages", "requests", "both"])
async def test_silence_is_noticed_however_it_is_made(hosts: Hosts, wire: Wire, ways: tuple[Way, ...]) -> None:
    falling_silent = hosts.wire.when_forwarded(MIDDLE, lambda: hosts.wire.becomes(wire, *ways))
    guest = hosts.arrive()
    reading = guest.guarded.reading(PAGES - 1)
    await guest.until_lost(falling_silent, *NOTICED)
    assert not guest.running.done()
    hosts.wire.heal()
    assert await of(reading) == content(PAGES - 1)
    await guest.is_whole()


async def test_an_answer_to_a_fault_that_drips_keeps_no_lane_alive(hosts: Hosts) -> None:
    """Byte by byte a page takes minutes: each byte is heard, and none is an answer."""
    guest = hosts.arrive(push=False)
    await guest.until_paused(None)
    hosts.wire.becomes(Wire.DRIPS, Way.DOWN)
    reading = guest.guarded.reading(5)
    assert await guest.until_paused(*NOTICED) is Reason.LANE_SILENT
    hosts.wire.heal()
    assert await of(reading) == content(5)
    guest.session.set_pacing(PacingOptions())
    await guest.is_whole()


@pytest.mark.parametrize("late", [DEMAND, PUSH], ids=["demand", "push"])
async def test_a_lane_that_is_late_overtakes_nothing_and_loses_nothing(hosts: Hosts, late: int) -> None:
    guest = hosts.arrive(push=False, silence=PATIENCE)
    await guest.until_paused(None)
    hosts.wire.late(late, SILENCE / 3)
    guest.session.set_pacing(PacingOptions())
    readings = [(page, guest.guarded.reading(page)) for page in range(0, PAGES, 100)]
    for page, reading in readings:
        assert await of(reading) == content(page)
    await guest.is_whole()
    assert guest.session.pager.map.missing == 0
    assert guest.paused == [None]


async def test_a_lane_that_is_later_than_silence_may_be_is_dropped_and_what_it_says_then_harms_nobody(
    hosts: Hosts,
) -> None:
    guest = hosts.arrive(push=False)
    await guest.until_paused(None)
    hosts.wire.late(PUSH, 4 * SILENCE)
    hosts.wire.late(DEMAND, 4 * SILENCE)
    guest.session.set_pacing(PacingOptions())
    assert await guest.until_paused(*NOTICED) is Reason.LANE_SILENT
    await guest.is_whole()


@pytest.mark.parametrize("lane", [DEMAND, PUSH], ids=["demand", "push"])
async def test_old_bytes_that_come_again_are_refused_and_every_page_is_right(hosts: Hosts, lane: int) -> None:
    guest = hosts.arrive(push=False)
    await guest.until_paused(None)
    for page in (3, 700):
        assert await of(guest.guarded.reading(page)) == content(page)
    if lane == PUSH:
        guest.session.set_pacing(PacingOptions(bytes_per_second=MIDDLE))
        await guest.until_missing(PAGES // 2)
        guest.session.set_pacing(PacingOptions(disabled=True))
        await guest.until_still()
    hosts.wire.say_again(lane)
    if lane == PUSH:
        # What comes again may be part of a frame, which swallows what follows.
        guest.session.set_pacing(PacingOptions())
    await guest.until_paused(Reason.UNREQUESTED_PAGES, Reason.MALFORMED_PAGES, *NOTICED)
    guest.session.set_pacing(PacingOptions())
    await guest.is_whole()


async def test_who_accepts_and_says_nothing_is_not_waited_for(hosts: Hosts) -> None:
    hosts.wire.be_mute()
    guest = hosts.arrive()
    await guest.until_paused(Reason.SOURCE_UNREACHABLE)
    reading = guest.guarded.reading(9)
    # It was tried again meanwhile.
    await guest.until_paused(Reason.SOURCE_UNREACHABLE, behind=1)
    hosts.wire.heal()
    assert await of(reading) == content(9)
    await guest.is_whole()


async def test_who_falls_mute_is_noticed(hosts: Hosts) -> None:
    falling_mute = hosts.wire.when_forwarded(MIDDLE, hosts.wire.be_mute)
    guest = hosts.arrive()
    await guest.until_lost(falling_mute, Reason.SOURCE_UNREACHABLE)
    hosts.wire.heal()
    await guest.is_whole()


@pytest.mark.parametrize("times", [20])
async def test_a_wire_that_fails_again_and_again_in_each_way_loses_nothing(hosts: Hosts, times: int) -> None:
    guest = hosts.arrive()
    ways = [hosts.wire.cut, lambda: hosts.wire.hang_up(Way.DOWN), lambda: hosts.wire.becomes(Wire.SWALLOWS)]
    for number in range(times):
        behind = len(guest.paused)
        hosts.wire.when_forwarded(MIDDLE // 6, ways[number % len(ways)])
        if not await guest.lost_or_over(behind):
            break
        hosts.wire.heal()
    hosts.wire.when_forwarded(1 << 60, lambda: None)
    # It may have failed once more since the last loss.
    hosts.wire.heal()
    await guest.is_whole()
    assert hosts.source.completions == 1
