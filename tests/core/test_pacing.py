"""Pacing: push yields to demand, within bounds, and never stops for good."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pageferryd.core.pacing import GROWTH, MIN_WINDOW, Pacer, PacingOptions

KIB = 1024
OPTIONS = st.builds(
    PacingOptions,
    max_window=st.sampled_from([4 * KIB, 60 * KIB, 64 * KIB, 1024 * KIB]),
    max_credit=st.sampled_from([4 * KIB, 10 * KIB, 64 * KIB, 256 * KIB]),
    objective=st.just(0.001),
    max_hold=st.sampled_from([0.0, 0.001, 0.1]),
    bytes_per_second=st.sampled_from([0, 0, 1, 1000, 3_333_333]),
    disabled=st.sampled_from([False, False, True]),
)


class Bounds(RuleBasedStateMachine):
    @initialize(options=OPTIONS)
    def make(self, options: PacingOptions) -> None:
        self.now = 1000.0
        self.pacer = Pacer(options, self.now)
        self.under_way: list[int] = []
        self.waiting = 0

    @rule(seconds=st.sampled_from([0.0, 0.0003, 0.05, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fault(self) -> None:
        self.waiting += 1
        self.pacer.fault_raised(self.now)

    @rule(latency=st.sampled_from([0.0001, 0.5]))
    def end_fault(self, latency: float) -> None:
        self.waiting = max(0, self.waiting - 1)
        self.pacer.fault_ended(latency)

    @rule(share=st.sampled_from([0, 1, 2]))
    def arrive(self, share: int) -> None:
        if self.under_way:
            granted = self.under_way.pop(0)
            self.pacer.arrived(granted * share // 2, self.waiting)
            self.pacer.unspent(granted - granted * share // 2)

    @rule(options=OPTIONS)
    def limit(self, options: PacingOptions) -> None:
        self.pacer.set_options(options, self.now)

    @rule()
    def grant(self) -> None:
        before = sum(self.under_way)
        credit = self.pacer.credit(before, self.waiting, self.now)
        options = self.pacer.options
        assert credit % 4096 == 0
        assert 0 <= credit <= options.max_credit
        if credit:
            assert not options.disabled
            assert before + credit <= options.max_window
            self.under_way.append(credit)
            self.pacer.granted(credit)
        elif not before and not options.disabled:
            # Nothing is under way whose arrival could set push going again: the time must.
            due = self.pacer.wake_at(self.waiting, self.now)
            assert due is not None
            assert due > self.now
            assert self.pacer.wake_at(self.waiting, due) is None
            assert self.pacer.credit(0, self.waiting, due) >= 4096
            self.now = due

    @invariant()
    def the_window_keeps_its_bounds(self) -> None:
        if hasattr(self, "pacer"):
            most = self.pacer.options.max_window
            assert min(MIN_WINDOW, most) <= self.pacer.window <= most
            assert self.pacer.held_seconds >= 0


TestBounds = Bounds.TestCase
TestBounds.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def with_slow_faults(options: PacingOptions) -> Pacer:
    """A pacer whose guest has waited longer than it should, for a while; its window is all there again."""
    pacer = Pacer(options, 0.0)
    for _ in range(16):
        pacer.fault_ended(4 * options.objective)
    for _ in range(options.max_window // GROWTH):
        pacer.arrived(256 * KIB, waiting=0)
    assert pacer.window == options.max_window
    return pacer


def test_push_goes_on_beside_faults_that_are_quick() -> None:
    pacer = Pacer(PacingOptions(), 0.0)
    for number in range(100):
        pacer.fault_raised(1.0 + number)
        assert pacer.credit(0, 1, 1.0 + number) > 0
        pacer.fault_ended(0.0009)
    assert pacer.window == PacingOptions().max_window


def test_where_faults_are_slow_each_halves_the_window_and_quiet_lets_it_grow_back() -> None:
    pacer = with_slow_faults(PacingOptions())
    pacer.fault_raised(1.0)
    assert pacer.window == PacingOptions().max_window // 2
    pacer.arrived(256 * KIB, waiting=1)
    assert pacer.window == PacingOptions().max_window // 2
    pacer.arrived(256 * KIB, waiting=0)
    assert pacer.window == PacingOptions().max_window // 2 + GROWTH


def test_a_fault_slower_than_the_objective_halves_the_window_at_once() -> None:
    pacer = Pacer(PacingOptions(objective=0.001), 0.0)
    pacer.fault_ended(0.0009)
    assert pacer.window == PacingOptions().max_window
    pacer.fault_ended(0.0011)
    assert pacer.window == PacingOptions().max_window // 2


def test_one_slow_fault_among_quick_ones_holds_nothing_back() -> None:
    pacer = Pacer(PacingOptions(), 0.0)
    pacer.fault_ended(3600.0)
    pacer.fault_raised(1.0)
    assert pacer.credit(0, 1, 1.0) > 0


def test_slow_faults_hold_push_back_until_they_are_quick_again() -> None:
    pacer = with_slow_faults(PacingOptions())
    pacer.fault_raised(1.0)
    assert pacer.credit(0, 1, 1.0) == 0
    for _ in range(64):
        pacer.fault_ended(0.0001)
    pacer.fault_raised(2.0)
    assert pacer.credit(0, 1, 2.0) > 0


def test_waiting_faults_hold_push_back_but_never_longer_than_the_longest_hold() -> None:
    pacer = with_slow_faults(PacingOptions(max_hold=0.001))
    pacer.fault_raised(1.0)
    assert pacer.credit(0, 1, 1.0) == 0
    assert pacer.credit(0, 1, 1.0005) == 0
    # Faults without a pause do not make the hold longer.
    pacer.fault_raised(1.0009)
    assert pacer.wake_at(1, 1.0009) == pytest.approx(1.001)
    assert pacer.credit(0, 1, 1.0011) > 0
    assert pacer.held_seconds == pytest.approx(0.0011)


def test_push_that_is_disabled_waits_for_no_time() -> None:
    pacer = Pacer(PacingOptions(disabled=True, bytes_per_second=1), 0.0)
    pacer.fault_raised(1.0)
    assert pacer.credit(0, 1, 1.0) == 0
    assert pacer.wake_at(1, 1.0) is None


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=40), st.integers(10_000, 10_000_000))
def test_a_rate_limit_holds_over_any_time_but_for_one_burst(pauses: list[float], rate: int) -> None:
    options = PacingOptions(bytes_per_second=rate)
    pacer = Pacer(options, 0.0)
    now, granted = 0.0, 0
    for pause in pauses:
        now += pause
        while credit := pacer.credit(0, 0, now):
            granted += credit
            pacer.granted(credit)
    assert granted <= now * rate + rate / 10 + options.max_credit


def test_asking_for_credit_that_is_not_used_costs_nothing() -> None:
    pacer = Pacer(PacingOptions(bytes_per_second=1000), 0.0)
    assert all(pacer.credit(0, 0, 1.0) for _ in range(100))


def test_pages_of_zeroes_do_not_count_against_the_rate() -> None:
    pacer = Pacer(PacingOptions(bytes_per_second=1000), 0.0)
    for _ in range(100):
        credit = pacer.credit(0, 0, 1.0)
        assert credit
        pacer.granted(credit)
        pacer.unspent(credit)
