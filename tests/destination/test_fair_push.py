"""Sessions that come at once share the host's push by weight, and none waits for one that does not push."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from queue_lanes import QueueLanes, QueueSource
from scripted_installer import ScriptedInstaller

from pageferryd.core import hold_gauge
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Lane, PagerOptions
from pageferryd.core.push_share import PushShare
from pageferryd.destination.session import Session, SessionOptions

DEADLINE = 30.0
MIB = 1 << 20
FULL = b"\x5a" * PAGE_SIZE


class Coming:
    """One guest on its way; `at` is called with its bytes at each message of push that its source gives."""

    def __init__(self, share: PushShare | None, mib: int, *, weight: int = 100, push: bool = True) -> None:
        layout = Layout([Region(0, mib * MIB, PAGE_SIZE)])
        self.source = QueueSource(layout, lambda _page: FULL)
        self.source.spoil = self._look
        self.at: Callable[[int], None] = lambda _pushed: None
        self.size = mib * MIB
        options = PagerOptions(silence=DEADLINE, pacing=PacingOptions(weight=weight, disabled=not push))
        self.session = Session(
            layout,
            [],
            ScriptedInstaller(),
            self.source,
            SessionOptions(options, backoff_initial=DEADLINE, backoff_max=DEADLINE),
            share=share,
        )
        self.running: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self.running = asyncio.create_task(self.session.run())
        self.session.start_push()
        return self.running

    @property
    def pushed(self) -> int:
        return self.session.pager.counts.push_bytes

    @property
    def lanes(self) -> QueueLanes:
        return self.source.connections[-1]

    def _look(self, lane: Lane, message: bytes) -> bytes:
        if lane is Lane.PUSH:
            self.at(self.pushed)
        return message

    async def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        await self.session.close()
        self.source.close()


Come = Callable[..., Coming]


@pytest.fixture
def share() -> PushShare:
    return PushShare(0, 0.0)


@pytest.fixture
async def come(share: PushShare) -> AsyncIterator[Come]:
    made: list[Coming] = []

    def make(mib: int, *, weight: int = 100, push: bool = True) -> Coming:
        made.append(Coming(share, mib, weight=weight, push=push))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sources are as fast here: how fast this machine is must not say that one is slow."""
    monkeypatch.setattr(hold_gauge, "PERIOD", 1e9)


async def first_of(guests: list[Coming]) -> list[int]:
    """Wait until one of them has all; return what each has by then."""
    tasks = [guest.running or guest.start() for guest in guests]
    await asyncio.wait(tasks, timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
    assert any(task.done() for task in tasks)
    return [guest.pushed for guest in guests]


async def all_of(guests: list[Coming]) -> None:
    """Wait until each of them has all."""
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(guest.running or guest.start() for guest in guests))
    assert [guest.pushed for guest in guests] == [guest.size for guest in guests]


@pytest.mark.usefixtures("no_trials")
async def test_guests_of_one_weight_get_the_same(come: Come) -> None:
    guests = [come(16) for _ in range(4)]
    got = await first_of(guests)
    for one in got:
        assert one == pytest.approx(sum(got) / len(got), rel=0.15)
    await all_of(guests)


@pytest.mark.usefixtures("no_trials")
async def test_guests_get_their_parts_by_weight(come: Come) -> None:
    weights = (100, 200, 400)
    guests = [come(36, weight=weight) for weight in weights]
    looks: list[list[int]] = []

    # Once all are under way, and before the first has asked for its last page.
    def look(pushed: int) -> None:
        if pushed >= (6 + 24 * len(looks)) * MIB and len(looks) < 2:
            looks.append([guest.pushed for guest in guests])

    guests[2].at = look
    await all_of(guests)
    got = [after - before for before, after in zip(*looks, strict=True)]
    for one, weight in zip(got, weights, strict=True):
        assert one / got[2] == pytest.approx(weight / 400, rel=0.2)


@pytest.mark.usefixtures("no_trials")
async def test_nobody_waits_for_a_guest_that_may_not_push(come: Come, share: PushShare) -> None:
    idle, guests = come(4, push=False), [come(8), come(8)]
    idle.start()
    await all_of(guests)
    assert idle.pushed == 0
    assert share.pushing == 0


@pytest.mark.usefixtures("no_trials")
async def test_nobody_waits_for_a_guest_whose_lanes_are_lost(come: Come) -> None:
    lost, guests = come(16), [come(16), come(16)]
    lost.at = lambda pushed: lost.lanes.cut() if pushed >= 2 * MIB else None
    lost.start()
    await all_of(guests)
    assert 2 * MIB <= lost.pushed < lost.size


async def test_a_guest_whose_source_says_nothing_delays_others_for_a_moment_only(come: Come) -> None:
    silent, guests = come(16), [come(16), come(16)]
    silent.at = lambda pushed: silent.source.flowing.clear() if pushed >= 2 * MIB else None
    silent.start()
    await all_of(guests)
    assert silent.pushed < silent.size


@pytest.mark.usefixtures("no_trials")
async def test_nobody_waits_for_a_guest_whose_session_was_closed(come: Come) -> None:
    closed, guests = come(16), [come(16), come(16)]
    began = asyncio.Event()
    closed.at = lambda _pushed: began.set()
    closed.start()
    for guest in guests:
        guest.start()
    await asyncio.wait_for(began.wait(), DEADLINE)
    await closed.session.close()
    await all_of(guests)


@pytest.mark.usefixtures("no_trials")
async def test_a_late_guest_neither_waits_for_others_nor_overtakes_them(come: Come) -> None:
    early, late = [come(32), come(32)], come(32)
    before: list[int] = []

    def join(pushed: int) -> None:
        if pushed >= 12 * MIB and not before:
            before.extend(guest.pushed for guest in early)
            late.start()

    early[0].at = join
    got = await first_of(early)
    since = [one - was for one, was in zip(got, before, strict=True)]
    # What was asked for before it came is under way still.
    assert late.pushed == pytest.approx(sum(since) / 2, rel=0.2)
    await all_of([*early, late])


@pytest.mark.usefixtures("no_trials")
async def test_a_weight_that_is_changed_counts_from_then_on(come: Come) -> None:
    guests = [come(40), come(40)]
    before: list[int] = []

    def change(pushed: int) -> None:
        if pushed >= 4 * MIB and not before:
            before.extend(guest.pushed for guest in guests)
            guests[0].session.set_pacing(PacingOptions(weight=400))

    guests[0].at = change
    got = await first_of(guests)
    since = [one - was for one, was in zip(got, before, strict=True)]
    assert since[0] / since[1] == pytest.approx(4, rel=0.25)
    await all_of(guests)


@pytest.mark.usefixtures("no_trials")
async def test_a_guest_alone_asks_as_it_does_without_a_share(come: Come) -> None:
    guest = come(8)
    plain = Coming(None, 8)
    asked: list[list[tuple[tuple[int, int], ...]]] = []
    try:
        for one in (guest, plain):
            await all_of([one])
            asked.append(one.lanes.pushes)
    finally:
        await plain.close()
    assert asked[0] == asked[1]


async def test_guests_under_the_rate_of_the_host_all_arrive(come: Come, share: PushShare) -> None:
    limited = PushShare(200 * MIB, 0.0)
    guests = [Coming(limited, 8, weight=weight) for weight in (100, 100, 300)]
    try:
        await all_of(guests)
    finally:
        for guest in guests:
            await guest.close()
    assert limited.pushing == 0
