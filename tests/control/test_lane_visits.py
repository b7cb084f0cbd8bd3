"""Who is hung up on when too many are connected to the lane server."""

from __future__ import annotations

from pageferryd.control.lane_visits import MAX_OF_ONE, MAX_UNPROVED, Visit, Visits


def test_a_host_that_floods_crowds_out_its_own_and_nobody_elses() -> None:
    visits = Visits()
    honest = Visit("192.0.2.1")
    assert visits.came(honest) is None
    flood = [Visit("192.0.2.66") for _ in range(10 * MAX_UNPROVED)]
    gone = [visits.came(visit) for visit in flood]
    assert honest not in gone
    assert [one for one in gone if one is not None] == flood[: len(flood) - (MAX_UNPROVED - 1)]
    assert len(visits) == MAX_UNPROVED
    assert visits.proved(honest, "m") is None


def test_of_one_host_the_oldest_that_said_nothing_goes() -> None:
    visits = Visits()
    flood = [Visit("::1") for _ in range(MAX_UNPROVED)]
    for visit in flood:
        assert visits.came(visit) is None
    visits.proved(flood[0], "m")
    assert visits.came(Visit("::1")) is None
    assert visits.came(Visit("::1")) is flood[1]


def test_the_newest_lanes_of_a_migration_stay_and_those_of_others_are_untouched() -> None:
    visits = Visits()
    other = Visit("a")
    visits.came(other)
    visits.proved(other, "other")
    lanes = [Visit("b") for _ in range(3 * MAX_OF_ONE)]
    gone = []
    for lane in lanes:
        visits.came(lane)
        gone.append(visits.proved(lane, "m"))
    assert [one for one in gone if one is not None] == lanes[: 2 * MAX_OF_ONE]
    assert set(visits.all()) == {other, *lanes[2 * MAX_OF_ONE :]}


def test_nothing_is_remembered_of_who_went() -> None:
    visits = Visits()
    for number in range(1000):
        silent, lane = Visit("a"), Visit("b")
        visits.came(silent)
        visits.came(lane)
        visits.proved(lane, f"migration {number}")
        for visit in (silent, lane, silent):
            visits.went(visit)
    assert len(visits) == 0
    assert not visits._lanes
