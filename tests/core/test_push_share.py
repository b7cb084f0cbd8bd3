"""The push share: every guest gets its part of what the host can push, and none waits for one that does not push."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pageferryd.core.hold_gauge import PERIOD
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Lane, Pager, PagerOptions
from pageferryd.core.push_share import (
    DEFAULT_WEIGHT,
    LEAST_UNDER_WAY,
    MAX_REQUEST,
    SLACK,
    PushShare,
    ShareMember,
)
from pageferryd.core.runs import RAW, Run

MIB = 1 << 20
WINDOW = 1 * MIB


class Guest:
    """A member with a window, and what it was granted; its requests are answered when the test says."""

    def __init__(self, share: PushShare, weight: int = DEFAULT_WEIGHT) -> None:
        self.member: ShareMember = share.join(weight, self._wake)
        self.under_way: list[int] = []
        self.granted = 0
        self.told = 0

    def _wake(self) -> None:
        self.told += 1

    def ask(self, now: float = 0.0) -> int:
        room = WINDOW - sum(self.under_way)
        credit = self.member.ask(room, sum(self.under_way), WINDOW, now) if room >= LEAST_UNDER_WAY else 0
        if credit:
            self.member.granted(credit)
            self.under_way.append(credit)
            self.granted += credit
        return credit

    def ask_all(self, now: float = 0.0) -> None:
        while self.ask(now):
            pass

    def arrive(self, now: float = 0.0) -> None:
        self.member.arrived(self.under_way.pop(0), now)


def share(bytes_per_second: int = 0) -> PushShare:
    return PushShare(bytes_per_second, 0.0)


def move(guests: list[Guest], rounds: int, now: float = 0.0, seconds: float = 0.0) -> None:
    """Answer one request of each guest in turn, as a host does that treats all alike."""
    for _ in range(rounds):
        for guest in guests:
            guest.ask_all(now)
        for guest in guests:
            if guest.under_way:
                guest.arrive(now)
        now += seconds


def test_a_guest_alone_may_ask_for_all_that_its_pacer_allows() -> None:
    guest = Guest(share())
    assert guest.ask() == WINDOW
    assert guest.member.wake_at(0.0) is None


@pytest.mark.parametrize("weights", [(100, 100), (100, 200, 400), (10, 1000), (100,) * 16, (50, *(200,) * 15)])
def test_guests_get_their_parts_by_weight(weights: tuple[int, ...]) -> None:
    one = share()
    guests = [Guest(one, weight) for weight in weights]
    move(guests, 60_000 // len(guests))
    total = sum(guest.granted for guest in guests)
    for guest, weight in zip(guests, weights, strict=True):
        assert guest.granted / total == pytest.approx(weight / sum(weights), rel=0.05)


def test_a_guest_that_is_too_far_ahead_is_told_when_the_others_have_come_closer() -> None:
    one = share()
    ahead, behind = Guest(one), Guest(one)
    behind.ask()
    while ahead.ask():
        ahead.arrive()
    assert ahead.told == 0
    assert ahead.granted > SLACK

    while not ahead.told:
        behind.arrive()
        assert behind.ask()
    assert ahead.ask()
    assert ahead.told == 1


@pytest.mark.parametrize("pushing", [1, 3])
def test_a_guest_that_rests_holds_nobody_back_and_saves_nothing_up(pushing: int) -> None:
    one = share()
    resting = Guest(one)
    guests = [Guest(one) for _ in range(pushing)]
    move([resting, *guests], 10)
    resting.member.rest()
    move(guests, 200)
    before = [guest.granted for guest in guests]
    assert min(before) > 50 * MIB
    assert resting.granted < 5 * MIB

    move([resting, *guests], 100)
    for guest, count in zip(guests, before, strict=True):
        assert guest.granted - count == pytest.approx(resting.granted, rel=0.3)


def test_whoever_was_held_back_for_a_guest_is_told_when_that_one_rests() -> None:
    one = share()
    ahead, behind = Guest(one), Guest(one)
    behind.ask()
    while ahead.ask():
        ahead.arrive()
    behind.member.rest()
    assert ahead.told == 1
    assert ahead.ask() == WINDOW


def test_a_late_guest_neither_waits_nor_overtakes() -> None:
    one = share()
    early = [Guest(one) for _ in range(3)]
    move(early, 100)
    late = Guest(one)
    assert late.ask()
    before = [guest.granted for guest in early]
    move([*early, late], 100)
    for guest, count in zip(early, before, strict=True):
        assert guest.granted - count == pytest.approx(late.granted, rel=0.15)


def test_a_weight_that_rises_lets_its_guest_go_on_at_once() -> None:
    one = share()
    light, heavy = Guest(one, 1), Guest(one, 1000)
    heavy.ask()
    while light.ask():
        light.arrive()
    light.member.set_weight(1000)
    assert light.told == 1
    assert light.ask()


def test_a_weight_that_falls_counts_from_now_on() -> None:
    one = share()
    guests = [Guest(one), Guest(one)]
    move(guests, 100)
    guests[0].member.set_weight(25)
    before = [guest.granted for guest in guests]
    move(guests, 400)
    got = [guest.granted - count for guest, count in zip(guests, before, strict=True)]
    assert got[1] / got[0] == pytest.approx(4, rel=0.05)


# Slow sources


def test_a_guest_whose_source_is_silent_holds_others_back_for_a_moment_only() -> None:
    one = share()
    silent, guest = Guest(one), Guest(one)
    silent.ask()
    now = 0.0
    for _ in range(100):
        while guest.granted <= 100 * MIB and guest.ask(now):
            guest.arrive(now)
        if guest.granted > 100 * MIB:
            break
        due = guest.member.wake_at(now)
        assert due is not None
        assert now < due <= now + PERIOD
        now = due
    assert guest.granted > 100 * MIB
    assert now <= 10 * PERIOD


def test_a_guest_with_a_slow_source_costs_others_little_and_is_not_held_back_itself() -> None:
    one = share()
    slow, fast = Guest(one), Guest(one)
    # For 4 s a slow source answers every 16 ms, a fast one every half.
    for tick in range(4000):
        now = tick / 1000
        slow.ask_all(now)
        if tick % 16 == 0 and slow.under_way:
            slow.arrive(now)
        for _ in range(2):
            fast.ask_all(now)
            if fast.under_way:
                fast.arrive(now)
    # A window of 1 MiB is asked for in four requests.
    assert fast.granted > 0.9 * 8000 * WINDOW // 4
    assert slow.granted > 0.9 * 250 * WINDOW // 4


def test_holding_goes_on_where_it_costs_nothing() -> None:
    one = share()
    guests = [Guest(one), Guest(one, 400)]
    move(guests, 20_000, seconds=0.0003)
    assert guests[1].granted / guests[0].granted == pytest.approx(4, rel=0.1)


# The host's rate


def test_all_guests_together_keep_the_rate_of_the_host_and_share_it() -> None:
    rate = 10 * MIB
    one = share(rate)
    guests = [Guest(one), Guest(one), Guest(one, 200)]
    waiting = dict.fromkeys(guests, 0.0)
    now = 0.0
    while now < 20:
        for guest in [guest for guest, due in waiting.items() if due <= now or guest.told]:
            guest.told = 0
            while guest.ask(now):
                guest.arrive(now)
            waiting[guest] = guest.member.wake_at(now) or float("inf")
        now = now if any(guest.told for guest in guests) else max(now, min(waiting.values()))
    got = [guest.granted for guest in guests]
    assert sum(got) == pytest.approx(20 * rate, rel=0.05)
    assert got[1] / got[0] == pytest.approx(1, rel=0.1)
    assert got[2] / got[0] == pytest.approx(2, rel=0.1)


def test_one_guest_alone_keeps_the_rate_of_the_host_and_what_it_did_not_use_does_not_count() -> None:
    guest = Guest(share(10 * MIB))
    while guest.ask(1.0):
        guest.arrive(1.0)
    assert guest.granted <= 3 * MIB
    due = guest.member.wake_at(1.0)
    assert due is not None
    assert due > 1.0
    guest.member.unspent(2 * MIB)
    assert guest.ask(1.0)


# Faults first


def test_slow_faults_of_one_guest_shrink_what_others_have_under_way_and_quiet_lets_it_grow_back() -> None:
    one = share()
    faulting, guest = Guest(one), Guest(one)
    move([faulting, guest], 2)
    for _ in range(20):
        faulting.member.give_way()
    while guest.under_way:
        guest.arrive()
        faulting.member.give_way()
    guest.ask_all()
    assert sum(guest.under_way) == LEAST_UNDER_WAY

    move([faulting, guest], 100)
    assert one.part == 1
    guest.ask_all()
    assert sum(guest.under_way) > WINDOW - LEAST_UNDER_WAY


def test_a_guest_that_faults_and_does_not_push_shrinks_the_push_of_the_only_one_that_does() -> None:
    one = share()
    faulting, guest = Guest(one), Guest(one)
    for _ in range(20):
        faulting.member.give_way()
    assert guest.ask() == LEAST_UNDER_WAY


def test_a_guest_alone_is_not_restricted_for_its_own_faults() -> None:
    guest = Guest(share())
    guest.member.give_way()
    assert guest.ask() == WINDOW


def pager_in(one: PushShare, objective: float = 1e-3) -> Pager:
    layout = Layout([Region(0, 16 * MIB, PAGE_SIZE)])
    member = one.join(DEFAULT_WEIGHT, lambda: None)
    return Pager(layout, PagerOptions(pacing=PacingOptions(objective=objective)), 0.0, member)


@pytest.mark.parametrize(("latency", "part"), [(0.0009, 1.0), (0.0011, 0.5)])
def test_a_pager_says_when_a_fault_was_slower_than_its_objective(latency: float, part: float) -> None:
    one = share()
    pager = pager_in(one)
    pager.fault(5, 1.0)
    pager.installed(Run(5, 1, RAW), Lane.DEMAND, 1.0 + latency)
    assert one.part == part


def test_a_pager_that_has_asked_for_everything_or_lost_its_lane_holds_nobody_back() -> None:
    one = share()
    pager = pager_in(one)
    assert pager.next_push(0.0) is not None
    assert one.pushing == 1
    pager.lane_lost(Lane.PUSH)
    assert one.pushing == 0

    assert pager.next_push(0.0) is not None
    pager.set_pacing(PacingOptions(disabled=True), 0.0)
    assert pager.next_push(0.0) is None
    assert one.pushing == 0

    small = Pager(Layout([Region(0, PAGE_SIZE, PAGE_SIZE)]), PagerOptions(), 0.0, one.join(1, lambda: None))
    assert small.next_push(0.0) is not None
    assert small.next_push(0.0) is None
    assert one.pushing == 0


class Progress(RuleBasedStateMachine):
    """Whatever happens, some guest that wants to push may, or the time or what is under way changes that."""

    @initialize(rate=st.sampled_from([0, 0, 1000, 50 * MIB]), weights=st.lists(st.integers(1, 1000), min_size=1))
    def make(self, rate: int, weights: list[int]) -> None:
        self.now = 0.0
        self.share = PushShare(rate, 0.0)
        self.guests = [Guest(self.share, weight) for weight in weights[:6]]
        self.refused: dict[Guest, float | None] = {}

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self._ask(data.draw(st.sampled_from(self.guests)))

    def _ask(self, guest: Guest) -> int:
        guest.told = 0
        granted = guest.ask(self.now)
        assert sum(guest.under_way) <= WINDOW
        if granted:
            self.refused.pop(guest, None)
        else:
            self.refused[guest] = guest.member.wake_at(self.now)
        return granted

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.guests))
        if guest.under_way:
            guest.arrive(self.now)
            if guest in self.refused:
                # It has room again, and asks.
                self.refused[guest] = self.now

    @rule(data=st.data())
    def rest(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.guests))
        guest.member.rest()
        self.refused.pop(guest, None)

    @rule(data=st.data(), weight=st.integers(1, 1000))
    def weigh(self, data: st.DataObject, weight: int) -> None:
        data.draw(st.sampled_from(self.guests)).member.set_weight(weight)

    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.guests)).member.give_way()
        assert 0 < self.share.part <= 1

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.5, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: getattr(self, "refused", None))
    @rule()
    def somebody_goes_on(self) -> None:
        """Everything under way comes, and whoever is told or has a time asks: then every refused guest gets a grant."""
        left = set(self.refused)
        for guest in self.guests:
            while guest.under_way:
                guest.arrive(self.now)
                # Who has room asks, as after each arrival.
                self.refused.setdefault(guest, self.now)
                self.refused[guest] = self.now
        for _ in range(200_000):
            ready = [one for one, due in self.refused.items() if one.told or (due is not None and due <= self.now)]
            if not ready:
                times = [due for due in self.refused.values() if due is not None]
                if not times:
                    break
                self.now = max(self.now, min(times))
                continue
            for one in ready:
                self._ask(one)
                if one.under_way:
                    left.discard(one)
                    one.arrive(self.now)
                    one.member.rest()
                    self.refused.pop(one, None)
            if not left:
                break
        assert not left


TestProgress = Progress.TestCase
TestProgress.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(10, 1000), min_size=2, max_size=8),
    turns=st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=50, max_size=400),
)
def test_nobody_that_goes_on_asking_falls_behind_by_more_than_the_slack_and_a_request(
    weights: list[int], turns: list[tuple[int, bool]]
) -> None:
    one = share()
    guests = [Guest(one, weight) for weight in weights]
    for guest in guests:
        guest.ask()
    for number, arrives in turns:
        guest = guests[number % len(guests)]
        if arrives and guest.under_way:
            guest.arrive()
        guest.ask()
        served = [guest.member.time for guest in guests]
        most = [MAX_REQUEST * DEFAULT_WEIGHT / weight for weight in weights]
        # The first of all asked while it was alone.
        first = WINDOW * DEFAULT_WEIGHT / weights[0]
        assert max(served) - min(served) <= SLACK + max(*most, first)
