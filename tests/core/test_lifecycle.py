"""The lifecycle: every change of state, legal or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.v1 import migration_pb2
from pageferryd.core.errors import IllegalTransitionError
from pageferryd.core.lifecycle import LEGAL, Lifecycle, State

# Said once more on purpose, so that a change of the table is a decision.
EXPECTED = {
    "PENDING": "PREPARING FAILED CANCELLED",
    "PREPARING": "PENDING HANDING_OVER FAILED CANCELLED",
    "HANDING_OVER": "POSTCOPY POSTCOPY_PAUSED FAILED CANCELLED",
    "POSTCOPY": "POSTCOPY_PAUSED IN_DOUBT COMPLETED FAILED",
    "POSTCOPY_PAUSED": "POSTCOPY IN_DOUBT COMPLETED FAILED",
    "IN_DOUBT": "POSTCOPY POSTCOPY_PAUSED COMPLETED FAILED",
    "COMPLETED": "",
    "FAILED": "",
    "CANCELLED": "",
}


def in_state(state: State, moves: list[tuple[State, State]] | None = None) -> Lifecycle:
    lifecycle = Lifecycle(lambda old, new: moves.append((old, new)) if moves is not None else None)
    lifecycle.state = state
    return lifecycle


@pytest.mark.parametrize("old", State)
@pytest.mark.parametrize("new", State)
def test_a_change_is_made_exactly_when_it_is_legal(old: State, new: State) -> None:
    moves: list[tuple[State, State]] = []
    lifecycle = in_state(old, moves)
    if new.name in EXPECTED[old.name].split():
        lifecycle.to(new)
        assert lifecycle.state is new
        assert moves == [(old, new)]
        return
    with pytest.raises(IllegalTransitionError, match=f"{old.name} cannot become {new.name}") as raised:
        lifecycle.to(new)
    assert raised.value.reason == "ILLEGAL_STATE"
    assert lifecycle.state is old
    assert moves == []


@pytest.mark.parametrize("state", State)
def test_a_state_is_final_exactly_when_nothing_follows_it(state: State) -> None:
    assert state.final == (not LEGAL[state])


@given(st.lists(st.sampled_from(State), max_size=30))
def test_a_guest_that_belongs_to_the_destination_never_goes_back(wishes: list[State]) -> None:
    lifecycle = Lifecycle()
    owned = False
    for wish in wishes:
        if wish in LEGAL[lifecycle.state]:
            lifecycle.to(wish)
        owned = owned or lifecycle.state.owned_by_destination
        if owned:
            assert lifecycle.state.owned_by_destination or lifecycle.state is State.FAILED


@pytest.mark.parametrize("state", State)
def test_a_required_state_is_named_in_the_error(state: State) -> None:
    in_state(state).require(state, State.PENDING)
    others = [other for other in State if other is not state]
    with pytest.raises(IllegalTransitionError, match=f"is in {state.name}; this needs .* or {others[-1].name}"):
        in_state(state).require(*others)


def test_states_have_the_numbers_of_the_contract() -> None:
    assert {f"MIGRATION_STATE_{state.name}": state.value for state in State} == {
        name: number for name, number in migration_pb2.MigrationState.items() if number
    }
