"""A source's sidecar that was killed, and starts again: where its notes say that the guest is, it goes on."""

from __future__ import annotations

import asyncio

import pytest
from leaving import BOOM, DEADLINE, Departure
from stand_in_destination import STATES

from pageferry.errors import FerryError, Reason
from pageferryd.core.lifecycle import State
from pageferryd.vmm.driver import Activity

pytestmark = pytest.mark.root

LOST = FerryError(Reason.SHUTTING_DOWN, "the answer was lost")


async def given(departure: Departure) -> None:
    """The guest was given away, its memory is on its way, and the sidecar is gone."""
    outgoing = departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    await asyncio.wait_for(outgoing.stop(), DEADLINE)
    assert departure.notes() == ["m.given"]


async def completes(departure: Departure) -> None:
    await departure.there.complete()
    departure.there.report(STATES.MIGRATION_STATE_COMPLETED)
    await departure.ended()
    assert departure.record.state is State.COMPLETED
    assert departure.vmm.killed
    assert departure.notes() == []


async def test_the_guest_is_noted_before_it_stops_and_again_before_it_may_run_elsewhere(departure: Departure) -> None:
    pausing, committing = departure.vmm.gate("pause"), departure.there.gate("Commit")
    departure.begin()
    await pausing.until_reached()
    assert departure.notes() == ["m.leaving"]
    pausing.opened.set()
    await committing.until_reached()
    assert departure.notes() == ["m.given"]
    committing.opened.set()
    await departure.until(lambda: "Report" in departure.there.calls)
    await completes(departure)


async def test_a_guest_that_was_given_away_is_served_again_before_anybody_asks(departure: Departure) -> None:
    await given(departure)
    again = await departure.again()
    assert again.committed
    assert await departure.there.can_fetch()
    assert "resume" not in departure.vmm.calls
    await departure.until(lambda: "Report" in departure.there.calls)
    assert "Commit" in departure.there.calls
    assert departure.record.state is State.POSTCOPY
    await completes(departure)


async def test_what_was_asked_for_is_known_again(departure: Departure) -> None:
    await given(departure)
    before = departure.record
    again = await departure.again()
    for name in ("request_id", "guest_id", "destination_name", "destination_address", "limits", "policy"):
        assert getattr(again.record, name) == getattr(before, name)
    assert abs(again.record.created - before.created) < 0.001


async def test_private_pages_are_private_again(departure: Departure) -> None:
    departure.vmm.private = type(departure.vmm.private)([(4096, 8192)], opaque=True)
    await given(departure)
    again = await departure.again()
    assert again.served is not None
    assert [again.served.private.next_present(0, 16), again.served.private.count] == [1, 2]


async def killed_before_it_was_given(departure: Departure) -> None:
    """The guest stands still, the destination has its state, and the sidecar was killed: it has undone nothing."""
    handing = departure.there.gate("HandOver")
    outgoing = departure.begin()
    await handing.until_reached()
    (note,) = departure.settings.runtime_dir.glob("journal.d/*")
    content = note.read_bytes()
    handing.opened.set()
    await asyncio.wait_for(outgoing.stop(), DEADLINE)
    note.parent.mkdir()
    note.write_bytes(content)
    departure.vmm.activity, departure.there.aborted = Activity.PAUSED, False


async def test_a_guest_that_was_not_given_away_goes_on_here(departure: Departure) -> None:
    await killed_before_it_was_given(departure)
    await departure.again()
    await departure.ended()
    assert departure.record.state is State.FAILED
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.INTERRUPTED
    departure.assert_here_alone()
    assert departure.there.aborted
    assert departure.notes() == []


async def test_a_guest_that_went_on_by_itself_is_left_alone(departure: Departure) -> None:
    await killed_before_it_was_given(departure)
    departure.vmm.activity = Activity.RUNNING
    await departure.again()
    await departure.ended()
    departure.assert_here_alone()
    assert "resume" not in departure.vmm.calls
    assert departure.notes() == []


async def test_a_guest_that_cannot_be_resumed_stays_noted(departure: Departure) -> None:
    await killed_before_it_was_given(departure)
    departure.vmm.failures["resume"] = BOOM
    await departure.again()
    await departure.ended()
    assert departure.notes() == ["m.leaving"]
    departure.vmm.failures.clear()
    await departure.again()
    await departure.ended()
    departure.assert_here_alone()
    assert departure.notes() == []


async def test_a_destination_that_never_ran_it_gives_the_guest_back_later_too(departure: Departure) -> None:
    departure.there.lost["Commit"] = LOST
    outgoing = departure.begin()
    await departure.until(lambda: departure.record.state is State.IN_DOUBT)
    await asyncio.wait_for(outgoing.stop(), DEADLINE)
    departure.there.runs = False
    departure.there.failures["Commit"] = FerryError(Reason.NEVER_RAN, "it was given up")
    await departure.again()
    await departure.ended()
    departure.assert_here_alone()
    assert departure.notes() == []


async def test_a_destination_that_knows_nothing_is_no_proof_for_a_sidecar_that_started_again(
    departure: Departure,
) -> None:
    await given(departure)
    departure.there.failures["Commit"] = FerryError(Reason.UNKNOWN_MIGRATION, "what migration?")
    await departure.again()
    await departure.until(lambda: departure.record.state is State.IN_DOUBT)
    assert "resume" not in departure.vmm.calls
    assert await departure.there.can_fetch()
    departure.there.failures.clear()
    await departure.until(lambda: departure.record.state is State.POSTCOPY)
    await departure.until(lambda: "Report" in departure.there.calls)
    await completes(departure)


async def test_a_guest_that_has_arrived_is_ended_here(departure: Departure) -> None:
    departure.vmm.gate("kill")
    outgoing = departure.begin()
    await departure.until(lambda: "Report" in departure.there.calls)
    await departure.there.complete()
    await departure.vmm.gates["kill"].until_reached()
    assert departure.notes() == ["m.arrived"]
    await asyncio.wait_for(outgoing.stop(), DEADLINE)
    departure.vmm.gated.clear()
    await departure.again()
    departure.there.report(STATES.MIGRATION_STATE_COMPLETED)
    await departure.ended()
    assert departure.record.state is State.COMPLETED
    assert departure.vmm.killed
    assert departure.notes() == []


async def test_memory_that_went_with_its_vmm_fails_it_and_nothing_runs_here(
    departure: Departure, monkeypatch: pytest.MonkeyPatch
) -> None:
    await given(departure)
    monkeypatch.setattr("pageferryd.control.departure.is_process", lambda _pid, _started: False)
    await departure.again()
    await departure.ended()
    assert departure.record.error is not None
    assert departure.record.error.reason is Reason.VMM_GONE
    departure.assert_there_alone()
