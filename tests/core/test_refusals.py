"""Refusals: each is counted, few are told of, and what is remembered has a bound."""

from __future__ import annotations

import pytest

from pageferryd.core.refusals import API, LANE, MAX_REMEMBERED, PEER, SECONDS_BETWEEN, Refusal, Refusals


class Told:
    """Refusals with a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[Refusal] = []
        self.refusals = Refusals(lambda: self.now, self.lines.append)

    def note(self, where: str = API, reason: str = "ROLE_MISSING", who: str = "mallory") -> None:
        self.refusals.note(where, reason, who, "why")


@pytest.fixture
def told() -> Told:
    return Told()


def test_one_like_another_is_told_of_once_a_minute_and_counted_each_time(told: Told) -> None:
    for _ in range(100):
        told.note()
    assert told.lines == [Refusal(API, "ROLE_MISSING", "mallory", "why")]
    assert told.refusals.counts == {(API, "ROLE_MISSING"): 100}
    told.now += SECONDS_BETWEEN
    told.note()
    assert len(told.lines) == 2


def test_another_place_reason_or_caller_is_told_of_at_once(told: Told) -> None:
    told.note()
    told.note(where=PEER)
    told.note(reason="TOKEN_INVALID")
    told.note(who="eve")
    assert len(told.lines) == 4


def test_any_number_of_callers_with_names_of_any_length_takes_bounded_memory(told: Told) -> None:
    for number in range(10 * MAX_REMEMBERED):
        told.note(LANE, who=f"{number} " + "x" * 10_000)
    assert len(told.refusals._told_at) <= MAX_REMEMBERED
    assert max(len(who) for _, _, who in told.refusals._told_at) <= 256
    assert sum(told.refusals.counts.values()) == 10 * MAX_REMEMBERED
    assert len(told.refusals.counts) == 1


def test_the_longest_untold_is_forgotten_first(told: Told) -> None:
    told.note(who="mallory")
    for number in range(MAX_REMEMBERED):
        told.note(who=str(number))
    lines = len(told.lines)
    told.note(who=str(MAX_REMEMBERED - 1))
    assert len(told.lines) == lines
    told.note(who="mallory")
    assert len(told.lines) == lines + 1
