"""An operator's decision about a guest whose two ends cannot settle whose it is."""

from __future__ import annotations

import asyncio

import pytest
from leaving import BOOM, Departure
from stand_in_destination import STATES

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control.resolving import resolve
from pageferryd.core.lifecycle import State

pytestmark = pytest.mark.root

SHOW = migration_pb2.DECISION_UNSPECIFIED
RUN = migration_pb2.DECISION_RUN_AT_SOURCE
GIVE_UP = migration_pb2.DECISION_GIVE_UP
UNREACHABLE = FerryError(Reason.SHUTTING_DOWN, "it is off")
NEVER_RAN = migration_pb2.HandoverView(reachable=True, known=True, state=STATES.MIGRATION_STATE_FAILED)
OWNED = migration_pb2.HandoverView(
    reachable=True, known=True, handed_over=True, state=STATES.MIGRATION_STATE_POSTCOPY, pages_missing=7
)
WHOLE = migration_pb2.HandoverView(reachable=True, known=True, handed_over=True, state=STATES.MIGRATION_STATE_COMPLETED)
READY = migration_pb2.HandoverView(reachable=True, known=True, state=STATES.MIGRATION_STATE_HANDING_OVER)


async def in_doubt(departure: Departure, view: migration_pb2.HandoverView | None) -> None:
    """The guest may have run at the destination, which tells what the view says; None where it cannot be asked."""
    departure.there.failures["Commit"] = FerryError(Reason.INTERNAL, "no answer")
    departure.begin()
    await departure.until(lambda: departure.record.state is State.IN_DOUBT)
    if view is None:
        departure.there.failures["DescribeHandover"] = UNREACHABLE
    else:
        departure.there.view = view


async def decide(departure: Departure, decision: int, *, fenced: bool = False) -> list[migration_pb2.HandoverView]:
    value = migration_pb2.Decision.ValueType(decision)
    return await resolve(departure.outgoing, value, departure.around(), peer_fenced=fenced)


async def test_both_ends_are_shown_and_nothing_is_done_without_a_decision(departure: Departure) -> None:
    await in_doubt(departure, OWNED)
    here, there = await decide(departure, SHOW)
    assert (here.host, here.state, here.handed_over) == ("a", STATES.MIGRATION_STATE_IN_DOUBT, True)
    assert here.vmm_activity == "paused"
    assert "no answer" in here.detail
    assert there == OWNED
    assert departure.record.state is State.IN_DOUBT
    assert "resume" not in departure.vmm.calls


async def test_a_destination_that_cannot_be_asked_is_shown_as_that(departure: Departure) -> None:
    await in_doubt(departure, None)
    _, there = await decide(departure, SHOW)
    assert not there.reachable
    assert there.host == "b"
    assert "it is off" in there.detail


async def test_the_guest_runs_at_its_source_where_the_destination_has_not_got_it(departure: Departure) -> None:
    await in_doubt(departure, NEVER_RAN)
    here, _ = await decide(departure, RUN)
    assert departure.vmm.runs
    assert here.vmm_activity == "running"
    assert not here.handed_over
    assert departure.record.state is State.FAILED
    assert departure.notes() == []
    assert departure.guests.get("g").migration_id is None
    # Pages of a guest that runs here are nobody else's any more.
    assert not await departure.there.can_fetch()


@pytest.mark.parametrize(
    "view",
    [OWNED, READY, WHOLE, migration_pb2.HandoverView(reachable=True), None],
    ids=["owned", "ready", "whole", "unknown", "unreachable"],
)
async def test_the_guest_does_not_run_at_its_source_where_the_destination_may_have_it(
    departure: Departure, view: migration_pb2.HandoverView | None
) -> None:
    await in_doubt(departure, view)
    with pytest.raises(FerryError) as refused:
        await decide(departure, RUN)
    assert refused.value.reason is Reason.IN_DOUBT
    assert "resume" not in departure.vmm.calls
    assert departure.record.state is State.IN_DOUBT
    assert departure.notes() == ["m.given"]


@pytest.mark.parametrize("view", [migration_pb2.HandoverView(reachable=True), None], ids=["unknown", "unreachable"])
async def test_an_operator_who_has_fenced_the_destination_may_run_the_guest_here(
    departure: Departure, view: migration_pb2.HandoverView | None
) -> None:
    await in_doubt(departure, view)
    await decide(departure, RUN, fenced=True)
    assert departure.vmm.runs


async def test_a_fence_does_not_outweigh_a_destination_that_answers(departure: Departure) -> None:
    await in_doubt(departure, OWNED)
    with pytest.raises(FerryError):
        await decide(departure, RUN, fenced=True)
    assert not departure.vmm.runs


async def test_a_guest_that_cannot_be_resumed_can_be_decided_on_again(departure: Departure) -> None:
    await in_doubt(departure, NEVER_RAN)
    departure.vmm.failures["resume"] = BOOM
    with pytest.raises(FerryError):
        await decide(departure, RUN)
    # It is this host's by then, whoever looks.
    assert departure.notes() == ["m.leaving"]
    departure.vmm.failures.clear()
    await decide(departure, RUN)
    assert departure.vmm.runs
    assert departure.notes() == []


async def test_a_guest_whose_destination_has_failed_with_it_can_run_here_again(departure: Departure) -> None:
    departure.begin()
    await departure.until(lambda: departure.there.runs)
    departure.there.report(STATES.MIGRATION_STATE_FAILED, "VMM_GONE")
    await departure.ended()
    departure.there.view = NEVER_RAN
    await decide(departure, RUN)
    assert departure.vmm.runs
    assert departure.notes() == []


async def test_what_is_here_is_given_up_only_once_the_destination_has_all_of_it(departure: Departure) -> None:
    await in_doubt(departure, OWNED)
    with pytest.raises(FerryError) as refused:
        await decide(departure, GIVE_UP)
    assert refused.value.reason is Reason.IN_DOUBT
    assert not departure.vmm.killed
    departure.there.view = WHOLE
    await decide(departure, GIVE_UP)
    assert departure.vmm.killed
    assert departure.record.state is State.FAILED
    assert departure.notes() == []


async def test_there_is_nothing_to_decide_before_the_guest_was_given_away(departure: Departure) -> None:
    handing = departure.there.gate("HandOver")
    departure.begin()
    await handing.until_reached()
    for decision in (RUN, GIVE_UP):
        with pytest.raises(FerryError) as refused:
            await decide(departure, decision, fenced=True)
        assert refused.value.reason is Reason.IN_DOUBT
    handing.opened.set()
    await departure.until(lambda: "Report" in departure.there.calls)
    assert not departure.vmm.killed


async def test_a_decision_that_does_not_exist_is_refused(departure: Departure) -> None:
    await in_doubt(departure, NEVER_RAN)
    with pytest.raises(FerryError) as refused:
        await decide(departure, 99)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
    await asyncio.wait_for(departure.outgoing.stop(), 10)
