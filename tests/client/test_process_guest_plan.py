"""Contents and order of the process guest: all of memory follows from the step counter, and no two pages are alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.errors import FerryError, Reason
from pageferry.guests.pattern import HOLE_BLOCK, HOLE_VERSIONS, Pattern
from pageferry.guests.process.plan import Order, Plan, Progress, pack_state, unpack_state

# A machine under load is no failure.
unhurried = settings(deadline=None)

seeds = st.integers(0, 2**64 - 1)


@st.composite
def plans(draw: st.DrawFn, most_pages: int = 700) -> Plan:
    pages = draw(st.integers(1, most_pages))
    return Plan(
        seed=draw(seeds),
        pages=pages,
        working=draw(st.integers(1, pages)),
        holes=draw(st.integers(0, HOLE_BLOCK)),
        order=draw(st.sampled_from(Order)),
    )


@unhurried
@given(plans())
def test_a_pass_takes_every_page_of_the_working_set_once(plan: Plan) -> None:
    assert sorted(plan.page_at(step) for step in range(plan.working)) == list(range(plan.working))


@unhurried
@given(plans(most_pages=60), st.integers(0, 200))
def test_versions_are_those_that_the_steps_wrote(plan: Plan, steps: int) -> None:
    written = [0] * plan.pages
    for step in range(steps):
        written[plan.page_at(step)] = step // plan.working + 1

    assert [plan.version(page, steps) for page in range(plan.pages)] == written


def test_local_order_stays_among_neighbours_for_a_while() -> None:
    plan = Plan(seed=3, pages=4096, working=4096, holes=0, order=Order.LOCAL)

    first = [plan.page_at(step) for step in range(256)]

    assert max(first) - min(first) == 255
    assert first != sorted(first)


def test_sequential_order_goes_upwards() -> None:
    plan = Plan(seed=3, pages=100, working=100, holes=0, order=Order.SEQUENTIAL)

    assert [plan.page_at(step) for step in range(101)] == [*range(100), 0]


@unhurried
@given(
    seeds,
    st.tuples(st.integers(0, 2**30), st.integers(0, 2**40)),
    st.tuples(st.integers(0, 2**30), st.integers(0, 2**40)),
)
def test_a_page_differs_from_every_other_page_and_version(
    seed: int, one: tuple[int, int], other: tuple[int, int]
) -> None:
    pattern = Pattern(seed, holes=0)

    assert len(pattern.page(*one)) == 4096
    assert (pattern.page(*one) == pattern.page(*other)) == (one == other)


@unhurried
@given(seeds, st.integers(0, 2**30), st.integers(0, 2**40))
def test_both_halves_of_a_page_change_with_its_version(seed: int, number: int, version: int) -> None:
    pattern = Pattern(seed, holes=0)
    before, after = pattern.page(number, version), pattern.page(number, version + 1)

    assert before[:2048] != after[:2048]
    assert before[2048:] != after[2048:]


def test_holes_are_runs_of_zeroes_until_their_version_comes() -> None:
    pattern = Pattern(7, holes=16)

    holes = [number for number in range(128) if pattern.page(number, 0) == bytes(4096)]

    assert holes == [*range(48, 64), *range(112, 128)]
    assert pattern.page(48, HOLE_VERSIONS - 1) == bytes(4096)
    assert pattern.page(48, HOLE_VERSIONS) != bytes(4096)


@unhurried
@given(plans(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_the_state_carries_plan_and_progress(plan: Plan, steps: int, errors: int) -> None:
    assert unpack_state(pack_state(plan, Progress(steps, errors))) == (plan, Progress(steps, errors))


@unhurried
@given(st.binary(max_size=80))
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(FerryError) as refused:
        unpack_state(data)

    assert refused.value.reason is Reason.INVALID_ARGUMENT


@unhurried
@given(plans(), st.integers(0, 55), st.integers(0, 255))
def test_a_damaged_state_is_refused_or_gives_a_sound_plan(plan: Plan, at: int, value: int) -> None:
    state = bytearray(pack_state(plan, Progress(1, 0)))
    state[at] = value

    try:
        found, _ = unpack_state(bytes(state))
    except FerryError as error:
        assert error.reason is Reason.INVALID_ARGUMENT  # noqa: PT017 - either outcome is right
    else:
        assert 0 <= found.page_at(0) < found.working <= found.pages
        assert len(found.pattern.page(0, 0)) == 4096
