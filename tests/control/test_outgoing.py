"""The source's part of a migration: whatever fails or is taken back at whatever step, one host runs the guest."""

from __future__ import annotations

import asyncio

import pytest
from leaving import BOOM, DEADLINE, Departure
from stand_in_destination import STATES

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.core.lifecycle import State

pytestmark = pytest.mark.root


HERE = ("describe", "pause", "save_state", "private_pages")
THERE = ("Probe", "Prepare", "HandOver")
STEPS = [*HERE, *THERE]


async def test_a_guest_that_has_gone_ends_here_when_the_destination_has_everything(departure: Departure) -> None:
    departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    departure.there.report(STATES.MIGRATION_STATE_POSTCOPY)
    departure.assert_there_alone()
    assert departure.there.state == b"state"
    assert departure.record.downtime is not None
    assert not departure.vmm.killed
    assert await departure.there.can_fetch()

    await departure.there.complete()
    departure.there.report(STATES.MIGRATION_STATE_COMPLETED)
    await departure.ended()
    assert departure.record.state is State.COMPLETED
    assert departure.record.error is None
    assert departure.vmm.killed
    assert departure.vmm.calls == ["describe", "pause", "save_state", "private_pages", "kill"]
    departure.assert_there_alone()
    with pytest.raises(FerryError):
        departure.guests.get("g")
    # Said again by a destination that missed the answer, it is answered again.
    await departure.there.complete()


async def test_the_memory_is_closed_until_the_guest_stands_still(departure: Departure) -> None:
    pausing = departure.vmm.gate("pause")
    departure.begin()
    await pausing.until_reached()
    assert departure.there.prepared is not None
    assert len(departure.there.prepared.token) == 32
    assert not await departure.there.can_fetch()


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_leaves_the_guest_here(departure: Departure, step: str) -> None:
    (departure.vmm.failures if step in HERE else departure.there.failures)[step] = BOOM
    departure.begin()
    await departure.ended()
    departure.assert_here_alone()
    assert departure.record.state is State.FAILED
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.NO_SPACE
    assert ("Abort" in departure.there.calls) == (step != "describe")
    assert "Commit" not in departure.there.calls


@pytest.mark.parametrize("step", ["Prepare", "HandOver"])
async def test_an_answer_that_is_lost_leaves_the_guest_here(departure: Departure, step: str) -> None:
    departure.there.lost[step] = FerryError(Reason.SHUTTING_DOWN, "the answer was lost")
    departure.begin()
    await departure.ended()
    departure.assert_here_alone()
    assert departure.there.aborted
    assert not await departure.there.can_fetch()


@pytest.mark.parametrize("step", STEPS)
async def test_a_migration_taken_back_at_any_step_leaves_the_guest_here(departure: Departure, step: str) -> None:
    gate = (departure.vmm if step in HERE else departure.there).gate(step)
    outgoing = departure.begin()
    await gate.until_reached()
    await asyncio.wait_for(outgoing.cancel(), DEADLINE)
    departure.assert_here_alone()
    assert departure.record.state is State.CANCELLED
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.CANCELLED
    await outgoing.cancel()
    gate.opened.set()
    await asyncio.sleep(0)
    departure.assert_here_alone()


async def test_a_migration_taken_back_before_it_began_leaves_the_guest_here(departure: Departure) -> None:
    outgoing = departure.begin()
    await asyncio.wait_for(outgoing.cancel(), DEADLINE)
    departure.assert_here_alone()
    assert departure.record.state is State.CANCELLED


async def test_taking_it_back_twice_at_once_waits_for_one_undoing(departure: Departure) -> None:
    gate, aborting = departure.there.gate("HandOver"), departure.there.gate("Abort")
    outgoing = departure.begin()
    await gate.until_reached()
    first, second = asyncio.create_task(outgoing.cancel()), asyncio.create_task(outgoing.cancel())
    await aborting.until_reached()
    third = asyncio.create_task(outgoing.stop())
    await asyncio.sleep(0)
    aborting.opened.set()
    await asyncio.wait_for(asyncio.gather(first, second, third), DEADLINE)
    departure.assert_here_alone()
    assert departure.vmm.calls.count("resume") == 1


async def test_a_destination_that_never_ran_it_gives_the_guest_back(departure: Departure) -> None:
    departure.there.failures["Commit"] = FerryError(Reason.NEVER_RAN, "too late")
    departure.begin()
    await departure.ended()
    departure.assert_here_alone()
    assert departure.record.state is State.FAILED


async def test_a_commit_without_an_answer_is_repeated_and_the_guest_stays_still_here(departure: Departure) -> None:
    departure.there.lost["Commit"] = FerryError(Reason.SHUTTING_DOWN, "the answer was lost")
    outgoing = departure.begin()
    await departure.until(lambda: departure.there.calls.count("Commit") >= 3)
    departure.assert_there_alone()
    assert departure.record.state is State.IN_DOUBT
    assert departure.record.error is not None
    with pytest.raises(FerryError) as refused:
        await outgoing.cancel()
    assert refused.value.reason is Reason.ALREADY_COMMITTED
    departure.assert_there_alone()

    departure.there.lost.clear()
    await departure.until(lambda: "Report" in departure.there.calls)
    assert departure.record.error is None
    assert departure.record.state is State.POSTCOPY
    await departure.there.complete()
    departure.there.report(STATES.MIGRATION_STATE_COMPLETED)
    await departure.ended()
    assert departure.record.state is State.COMPLETED
    departure.assert_there_alone()


async def test_a_completion_answers_for_a_commit_that_was_not_answered(departure: Departure) -> None:
    departure.there.lost["Commit"] = FerryError(Reason.SHUTTING_DOWN, "the answer was lost")
    departure.begin()
    await departure.until(lambda: departure.there.runs)
    await departure.there.complete()
    departure.there.report(STATES.MIGRATION_STATE_COMPLETED)
    await departure.ended()
    assert departure.record.state is State.COMPLETED
    assert departure.vmm.killed


async def test_the_sidecars_end_during_a_commit_does_not_run_the_guest_here(departure: Departure) -> None:
    committing = departure.there.gate("Commit")
    outgoing = departure.begin()
    await committing.until_reached()
    await asyncio.wait_for(outgoing.stop(), DEADLINE)
    assert "resume" not in departure.vmm.calls
    assert not departure.vmm.killed


async def test_a_destination_that_fails_with_the_guest_keeps_it(departure: Departure) -> None:
    departure.begin()
    await departure.until(lambda: departure.there.runs)
    departure.there.report(STATES.MIGRATION_STATE_FAILED, "VMM_GONE")
    await departure.ended()
    assert departure.record.state is State.FAILED
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.VMM_GONE
    departure.assert_there_alone()
    # Its memory may be all that is left of it.
    assert not departure.vmm.killed


async def test_a_destination_out_of_sight_pauses_the_migration_until_it_is_back(departure: Departure) -> None:
    departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    departure.there.reports.put_nowait(None)
    await departure.until(lambda: departure.record.state is State.POSTCOPY_PAUSED)
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.DESTINATION_UNREACHABLE
    departure.there.report(STATES.MIGRATION_STATE_POSTCOPY)
    await departure.until(lambda: departure.record.state is State.POSTCOPY)
    assert departure.record.error is None


async def test_what_pauses_the_destination_shows_here(departure: Departure) -> None:
    outgoing = departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    departure.there.report(STATES.MIGRATION_STATE_POSTCOPY_PAUSED, "LANE_SILENT")
    await departure.until(lambda: departure.record.state is State.POSTCOPY_PAUSED)
    assert outgoing.view().error.reason == "LANE_SILENT"
    await outgoing.reconnect()
    assert "Reconnect" in departure.there.calls


async def test_a_vmm_that_cannot_be_resumed_is_told_of(departure: Departure) -> None:
    departure.there.failures["HandOver"] = BOOM
    departure.vmm.failures["resume"] = FerryError(Reason.VMM_FAILED, "stuck")
    departure.begin()
    await departure.ended()
    assert departure.record.error is not None
    assert "could not be resumed: stuck" in departure.record.error.message
    assert not departure.there.runs


async def test_only_a_running_guest_is_moved(departure: Departure) -> None:
    from pageferryd.vmm.driver import Activity

    departure.vmm.activity = Activity.PAUSED
    departure.begin()
    await departure.ended()
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.GUEST_NOT_RUNNING
    assert departure.there.calls == []


async def test_another_protocol_is_refused_before_anything_is_touched(departure: Departure) -> None:
    departure.there.protocol = 99
    departure.begin()
    await departure.ended()
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.PROTOCOL_MISMATCH
    assert "Prepare" not in departure.there.calls
    departure.assert_here_alone()


async def test_limits_reach_a_destination_that_has_the_guest(departure: Departure) -> None:
    outgoing = departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    await outgoing.limit(migration_pb2.Limits(push_disabled=True))
    assert departure.record.limits.push_disabled
    assert "Limit" in departure.there.calls


async def test_a_destination_that_knows_nothing_at_the_first_commit_gives_the_guest_back(departure: Departure) -> None:
    departure.there.failures["Commit"] = FerryError(Reason.UNKNOWN_MIGRATION, "restarted")
    departure.begin()
    await departure.ended()
    departure.assert_here_alone()
    assert departure.record.state is State.FAILED


async def test_a_destination_that_knows_nothing_after_a_commit_without_an_answer_may_have_run_it(
    departure: Departure,
) -> None:
    departure.there.lost["Commit"] = FerryError(Reason.SHUTTING_DOWN, "the answer was lost")
    departure.begin()
    await departure.until(lambda: departure.record.error is not None)
    departure.there.lost["Commit"] = FerryError(Reason.UNKNOWN_MIGRATION, "restarted")
    told = departure.there.calls.count("Commit")
    await departure.until(lambda: departure.there.calls.count("Commit") >= told + 3)
    departure.assert_there_alone()
    assert departure.record.state is State.IN_DOUBT


async def test_a_vmm_that_does_not_end_does_not_fail_a_migration_that_is_complete(departure: Departure) -> None:
    departure.vmm.failures["kill"] = BOOM
    departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    await departure.there.complete()
    departure.there.report(STATES.MIGRATION_STATE_COMPLETED)
    await departure.ended()
    assert departure.record.state is State.COMPLETED
