"""The destination's part of a migration from its commit on: the guest is here, whatever happens."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Callable

import pytest
from coming import BOOM, DEADLINE, STATE, Coming
from stand_in_vmm import PAGES

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.core.errors import IllegalTransitionError
from pageferryd.core.lifecycle import State

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


@pytest.fixture
async def make(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callable[..., Coming]]:
    made: list[Coming] = []

    def make_one(**timeouts: float) -> Coming:
        made.append(Coming(tmp_path_factory.mktemp("s"), **timeouts))
        return made[-1]

    yield make_one
    for one in made:
        await one.stop()


@pytest.fixture
async def coming(make: Callable[..., Coming]) -> Coming:
    one = make()
    await one.start()
    return one


async def test_after_the_commit_an_abort_is_refused(coming: Coming) -> None:
    await coming.handed_over()
    await coming.incoming.commit()
    assert await coming.refused(coming.incoming.abort("no")) is Reason.ALREADY_COMMITTED
    assert coming.vmm.runs


async def test_from_the_begin_of_the_commit_an_abort_is_refused(coming: Coming) -> None:
    gate = coming.vmm.gate("resume")
    await coming.handed_over()
    committing = asyncio.create_task(coming.incoming.commit())
    await gate.until_reached()
    assert await coming.refused(coming.incoming.abort("no")) is Reason.ALREADY_COMMITTED
    committing.cancel()
    await asyncio.wait([committing])
    assert await coming.refused(coming.incoming.abort("no")) is Reason.ALREADY_COMMITTED
    gate.opened.set()
    await coming.incoming.commit()
    assert coming.vmm.runs


async def test_a_commit_whose_resume_failed_is_repeated(coming: Coming) -> None:
    coming.vmm.failures["resume"] = BOOM
    await coming.handed_over()
    assert await coming.refused(coming.incoming.commit()) is Reason.NO_SPACE
    assert await coming.refused(coming.incoming.abort("no")) is Reason.ALREADY_COMMITTED
    coming.vmm.failures.clear()
    await coming.incoming.commit()
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.COMPLETED


async def test_a_commit_before_the_state_is_refused(coming: Coming) -> None:
    await coming.prepared()
    assert await coming.refused(coming.incoming.commit()) is Reason.ILLEGAL_STATE
    assert not coming.vmm.runs
    await coming.incoming.abort("no")
    await coming.assert_never_ran()


async def test_without_a_commit_in_time_it_is_given_up(make: Callable[..., Coming]) -> None:
    coming = make(prepare_timeout=0.3, handover_timeout=0.01)
    await coming.start()
    await coming.handed_over()
    await coming.until(lambda: coming.record.state.final and coming.incoming.arrival is None)
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.HANDOFF_TIMEOUT
    await coming.assert_never_ran()


async def test_a_vmm_that_ends_before_the_commit_ends_the_migration(coming: Coming) -> None:
    await coming.handed_over()
    arrival = coming.incoming.arrival
    assert arrival is not None
    arrival.session.fail(FerryError(Reason.VMM_GONE, "the VMM ended"))
    await coming.until(lambda: coming.record.state.final and coming.incoming.arrival is None)
    await coming.assert_never_ran()


async def test_a_vmm_that_ends_after_the_commit_fails_it_and_commits_are_answered(coming: Coming) -> None:
    coming.vmm.failures["resume"] = FerryError(Reason.VMM_UNREACHABLE, "gone")
    await coming.handed_over()
    assert await coming.refused(coming.incoming.commit()) is Reason.VMM_UNREACHABLE
    arrival = coming.incoming.arrival
    assert arrival is not None
    arrival.session.fail(FerryError(Reason.VMM_GONE, "the VMM ended"))
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.FAILED
    # The source must not run the guest: the report tells it what happened.
    await coming.incoming.commit()
    assert await coming.refused(coming.incoming.abort("no")) is Reason.ALREADY_COMMITTED
    with pytest.raises(FerryError):
        coming.guests.get("g")


async def test_a_failure_here_leaves_the_guests_memory_guarded(coming: Coming) -> None:
    coming.record.limits.push_disabled = True
    request = coming.request()
    request.limits.push_disabled = True
    await coming.incoming.prepare(request)
    await coming.incoming.hand_over(STATE)
    await coming.incoming.commit()
    arrival = coming.incoming.arrival
    assert arrival is not None
    arrival.session.fail(FerryError(Reason.USERFAULTFD_REFUSED, "the VMM moved its memory"))
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.FAILED
    reading = asyncio.get_running_loop().run_in_executor(None, coming.vmm.memory.read, 0, 1)
    poll = select.poll()
    poll.register(arrival._memory.uffd.fileno(), select.POLLIN)
    assert await asyncio.to_thread(poll.poll, DEADLINE * 1000), "nobody waits for the page"
    assert not reading.done()
    # The test's own end of it: the page is put there, so that the thread can end.
    arrival._installer.zero(0, PAGES)
    await asyncio.wait_for(reading, DEADLINE)


async def test_limits_and_reconnect_are_refused_where_they_make_no_sense(coming: Coming) -> None:
    with pytest.raises(FerryError):
        coming.incoming.limit(migration_pb2.Limits())
    with pytest.raises(IllegalTransitionError):
        coming.incoming.reconnect()
    await coming.prepared()
    coming.incoming.limit(migration_pb2.Limits(push_window_bytes=1 << 20))
    assert coming.record.limits.push_window_bytes == 1 << 20
    await coming.incoming.abort("no")
    with pytest.raises(FerryError):
        coming.incoming.limit(migration_pb2.Limits())


async def test_a_source_that_is_lost_pauses_the_migration_until_it_is_back(coming: Coming) -> None:
    request = coming.request()
    request.limits.push_disabled = True
    await coming.incoming.prepare(request)
    await coming.incoming.hand_over(STATE)
    await coming.incoming.commit()
    arrival = coming.incoming.arrival
    assert arrival is not None
    served = coming._pages._served.pop("m")
    lanes = arrival.session._lanes
    assert lanes is not None
    await lanes.close()
    await coming.until(lambda: coming.record.state is State.POSTCOPY_PAUSED)
    await coming.until(
        lambda: coming.record.error is not None and coming.record.error.reason is Reason.UNKNOWN_MIGRATION
    )
    coming._pages.offer(served)
    coming.incoming.reconnect()
    coming.incoming.limit(migration_pb2.Limits())
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.COMPLETED
    assert coming.incoming.view().progress.reconnects >= 1


async def test_a_sidecar_that_stops_before_the_commit_gives_the_guest_up(coming: Coming) -> None:
    await coming.handed_over()
    await coming.incoming.stop()
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.SHUTTING_DOWN
    await coming.assert_never_ran()


async def test_a_guest_whose_memory_is_held_stays_busy_until_its_vmm_ends(coming: Coming) -> None:
    await coming.handed_over()
    arrival = coming.incoming.arrival
    assert arrival is not None
    coming.vmm.failures["resume"] = BOOM
    assert await coming.refused(coming.incoming.commit()) is Reason.NO_SPACE
    arrival.session.fail(FerryError(Reason.USERFAULTFD_REFUSED, "the VMM moved its memory"))
    await coming.until(lambda: coming.record.state.final)
    assert coming.guests.get("g").migration_id == "m"
    assert arrival._memory.uffd.fileno() >= 0

    arrival._vmm_ended()
    assert arrival._memory.uffd.fileno() == -1
