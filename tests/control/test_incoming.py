"""The destination's part of a migration: a real hand-off, real lanes, and a VMM that stands in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from stand_in_vmm import PAGES, StandInVmm

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, memory_pb2, migration_pb2
from pageferry.vmm.memory import GuestMemory
from pageferryd.config import Limits, Settings
from pageferryd.control.incoming import Incoming, Surroundings
from pageferryd.control.record import MigrationRecord
from pageferryd.control.registry import GuestRegistry
from pageferryd.control.view import layout_to_proto
from pageferryd.core.errors import IllegalTransitionError
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.lifecycle import State
from pageferryd.server import GrpcServer
from pageferryd.source.memory import SourceMemory
from pageferryd.source.page_service import PageService
from pageferryd.source.served import Served
from pageferryd.vmm.driver import Activity

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]
DEADLINE = 10.0
TOKEN = b"t" * 32
CONTENT = b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(PAGES))
BOOM = FerryError(Reason.NO_SPACE, "as the test says")


class Coming:
    """A VMM that waits on this host, and a source that serves it from this process."""

    def __init__(self, directory: Path, prepare_timeout: float = 5.0, handover_timeout: float = 5.0) -> None:
        limits = Limits(
            reconnect_initial_seconds=0.001,
            reconnect_max_seconds=0.01,
            prepare_timeout=prepare_timeout,
            handover_timeout=handover_timeout,
        )
        settings = Settings(host="b", listen=["127.0.0.1:0"], insecure=True, runtime_dir=directory, limits=limits)
        self.vmm = StandInVmm(Activity.INCOMING)
        self.guests = GuestRegistry({"stand-in": lambda _address: self.vmm})
        self._around = Surroundings(settings, None, self.guests)
        self._left = GuestMemory(len(CONTENT))
        self._left.write(0, CONTENT)
        location = memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self._left.address))
        source = SourceMemory.open(self.vmm.layout, [location], os.getpid())
        self.completed = asyncio.Event()
        self.served = Served("m", TOKEN, "b", source, self.vmm.layout, self.completed.set)
        self.served.open()
        self._pages = PageService(secure=False)
        self._pages.offer(self.served)
        self.server = GrpcServer(settings)
        self._pages.add_to(self.server.server)

    async def start(self) -> None:
        (self.address,) = await self.server.start()
        await self.guests.register("g", "stand-in", "here")
        self.record = MigrationRecord("m", "", "g", migration_pb2.ROLE_DESTINATION, "a", "b", "", migration_pb2.Limits())
        self.incoming = Incoming(self.record, self.guests.claim("g", "m"), self._around)
        self.vmm.calls.clear()

    def request(self, layout: Layout | None = None, token: bytes = TOKEN, address: str = "") -> incoming_pb2.PrepareRequest:
        return incoming_pb2.PrepareRequest(
            migration_id="m",
            guest_id="g",
            protocol_version=1,
            layout=layout_to_proto(layout or self.vmm.layout),
            page_address=address or self.address,
            source_name="a",
            token=token,
        )

    async def prepared(self) -> None:
        await self.incoming.prepare(self.request())

    async def handed_over(self) -> None:
        await self.prepared()
        await self.incoming.hand_over(b"state")

    async def refused(self, call: object) -> Reason:
        with pytest.raises((FerryError, IllegalTransitionError)) as refused:
            await asyncio.wait_for(call, DEADLINE)  # type: ignore[call-overload]
        return Reason(refused.value.reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                await asyncio.sleep(0.001)

    async def assert_never_ran(self) -> None:
        """It has ended, nothing is held any more, and no commit can run it."""
        assert self.record.state is State.FAILED
        assert not self.vmm.runs
        assert self.incoming.arrival is None
        assert self.guest_is_free()
        assert await self.refused(self.incoming.commit()) is Reason.NEVER_RAN
        assert "resume" not in self.vmm.calls
        assert not self.completed.is_set()

    def guest_is_free(self) -> bool:
        try:
            return self.guests.get("g").migration_id is None
        except FerryError:
            return True

    async def stop(self) -> None:
        for gate in self.vmm.gates.values():
            gate.opened.set()
        await self.incoming.stop()
        arrival = self.incoming.arrival
        if arrival is not None:
            await arrival.abandon()
        await self.guests.close()
        await self.server.stop(0)
        self._pages.withdraw("m")
        self.vmm.free()
        self._left.close()


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


async def test_a_guest_comes_with_all_of_its_memory(coming: Coming) -> None:
    await coming.handed_over()
    assert coming.vmm.loaded == b"state"
    assert not coming.vmm.runs
    await coming.incoming.commit()
    assert coming.vmm.runs
    await coming.until(lambda: coming.record.state.final)

    assert coming.record.state is State.COMPLETED
    assert coming.completed.is_set()
    assert coming.vmm.calls == ["describe", "attach_pager", "load_state", "resume", "detach_pager"]
    assert coming.guests.get("g").migration_id is None
    assert await asyncio.to_thread(coming.vmm.memory.read, 0, len(CONTENT)) == CONTENT
    progress = coming.incoming.view().progress
    assert (progress.pages_total, progress.pages_present) == (PAGES, PAGES)
    assert coming.record.postcopy_seconds is not None
    # A source that missed the answer asks again.
    await coming.incoming.commit()
    assert coming.vmm.calls.count("resume") == 1


async def test_the_state_may_touch_all_memory_before_the_commit(coming: Coming) -> None:
    await coming.handed_over()
    assert await asyncio.to_thread(coming.vmm.memory.read, 0, len(CONTENT)) == CONTENT
    assert coming.record.state is State.HANDING_OVER
    assert not coming.completed.is_set()
    await coming.incoming.commit()
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.COMPLETED


async def test_before_the_commit_the_guest_can_go_back_however_much_has_come(coming: Coming) -> None:
    await coming.handed_over()
    await asyncio.to_thread(coming.vmm.memory.read, 0, len(CONTENT))
    await coming.incoming.abort("changed its mind")
    await coming.assert_never_ran()
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.ABORTED_BY_SOURCE


REFUSED: dict[str, tuple[Callable[[Coming], incoming_pb2.PrepareRequest], Reason, bool]] = {
    "another size": (
        lambda one: one.request(layout=Layout([Region(0, PAGE_SIZE)])), Reason.LAYOUT_MISMATCH, False,
    ),
    "no layout": (
        lambda one: incoming_pb2.PrepareRequest(migration_id="m", token=TOKEN), Reason.LAYOUT_INVALID, False,
    ),
    "another token": (lambda one: one.request(token=bytes(32)), Reason.TOKEN_INVALID, True),
    "nobody there": (lambda one: one.request(address="unix:/nowhere"), Reason.SOURCE_UNREACHABLE, True),
    "no address": (lambda one: one.request(address="::::"), Reason.INVALID_ARGUMENT, True),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_prepared_is_given_up_with_its_reason(coming: Coming, case: str) -> None:
    request, reason, touched = REFUSED[case]
    assert await coming.refused(coming.incoming.prepare(request(coming))) is reason
    await coming.assert_never_ran()
    # A VMM that nothing was done to can wait for another guest.
    assert coming.vmm.killed == touched


async def test_a_vmm_that_runs_is_no_destination(coming: Coming) -> None:
    coming.vmm.activity = Activity.RUNNING
    assert await coming.refused(coming.prepared()) is Reason.GUEST_NOT_INCOMING
    assert coming.record.state is State.FAILED
    assert not coming.vmm.killed
    assert coming.guest_is_free()


@pytest.mark.parametrize("step", ["describe", "attach_pager"])
@pytest.mark.parametrize("failure", [BOOM, OSError("odd")])
async def test_a_vmm_that_fails_while_it_is_prepared_is_given_up(
    coming: Coming, step: str, failure: Exception
) -> None:
    coming.vmm.failures[step] = failure
    with pytest.raises(type(failure)):
        await coming.prepared()
    await coming.assert_never_ran()


@pytest.mark.parametrize("step", ["describe", "attach_pager"])
async def test_a_vmm_that_takes_too_long_is_given_up(make: Callable[..., Coming], step: str) -> None:
    coming = make(prepare_timeout=0.1)
    await coming.start()
    coming.vmm.gate(step)
    assert await coming.refused(coming.prepared()) is Reason.HANDOFF_TIMEOUT
    await coming.assert_never_ran()


@pytest.mark.parametrize("step", ["describe", "attach_pager"])
async def test_a_preparation_that_is_taken_back_is_given_up(coming: Coming, step: str) -> None:
    gate = coming.vmm.gate(step)
    preparing = asyncio.create_task(coming.prepared())
    await gate.until_reached()
    preparing.cancel()
    await asyncio.wait([preparing], timeout=DEADLINE)
    assert preparing.cancelled()
    await coming.assert_never_ran()


@pytest.mark.parametrize("step", ["describe", "attach_pager"])
async def test_an_abort_during_the_preparation_ends_it(coming: Coming, step: str) -> None:
    gate = coming.vmm.gate(step)
    preparing = asyncio.create_task(coming.refused(coming.prepared()))
    await gate.until_reached()
    await coming.incoming.abort("no")
    gate.opened.set()
    assert await preparing is Reason.ABORTED_BY_SOURCE
    await coming.assert_never_ran()
    assert coming.vmm.link is None or step == "attach_pager"


async def test_an_abort_before_the_vmm_was_touched_leaves_it_to_the_next_migration(coming: Coming) -> None:
    gate = coming.vmm.gate("describe")
    preparing = asyncio.create_task(coming.refused(coming.prepared()))
    await gate.until_reached()
    await coming.incoming.abort("no")
    next_one = coming.guests.claim("g", "next")
    gate.opened.set()
    await preparing
    assert next_one.migration_id == "next"
    assert not coming.vmm.killed
    assert "attach_pager" not in coming.vmm.calls


async def test_an_abort_after_each_step_ends_it_and_may_be_repeated(coming: Coming) -> None:
    await coming.prepared()
    await coming.incoming.abort("no")
    await coming.incoming.abort("no")
    assert coming.vmm.killed
    assert await coming.refused(coming.incoming.hand_over(b"state")) is Reason.ILLEGAL_STATE
    await coming.assert_never_ran()


async def test_an_abort_does_not_wait_for_a_state_that_hangs(coming: Coming) -> None:
    gate = coming.vmm.gate("load_state")
    await coming.prepared()
    loading = asyncio.create_task(coming.incoming.hand_over(b"state"))
    await gate.until_reached()
    await asyncio.wait_for(coming.incoming.abort("no"), DEADLINE)
    gate.opened.set()
    await asyncio.gather(loading, return_exceptions=True)
    await coming.assert_never_ran()


async def test_an_abort_whose_caller_hangs_up_is_carried_out(coming: Coming) -> None:
    await coming.handed_over()
    gate = coming.vmm.gate("kill")
    aborting = asyncio.create_task(coming.incoming.abort("no"))
    await gate.until_reached()
    aborting.cancel()
    await asyncio.wait([aborting])
    again = asyncio.create_task(coming.incoming.abort("no"))
    gate.opened.set()
    await asyncio.wait_for(again, DEADLINE)
    assert coming.vmm.killed
    await coming.assert_never_ran()


async def test_a_state_that_cannot_be_loaded_can_still_be_aborted(coming: Coming) -> None:
    coming.vmm.failures["load_state"] = BOOM
    await coming.prepared()
    assert await coming.refused(coming.incoming.hand_over(b"state")) is Reason.NO_SPACE
    await coming.incoming.abort("no")
    await coming.assert_never_ran()


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
    await coming.until(coming.guest_is_free)
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.HANDOFF_TIMEOUT
    await coming.assert_never_ran()


async def test_a_vmm_that_ends_before_the_commit_ends_the_migration(coming: Coming) -> None:
    await coming.handed_over()
    arrival = coming.incoming.arrival
    assert arrival is not None
    arrival.session.fail(FerryError(Reason.VMM_GONE, "the VMM ended"))
    await coming.until(coming.guest_is_free)
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
    await coming.incoming.hand_over(b"state")
    await coming.incoming.commit()
    arrival = coming.incoming.arrival
    assert arrival is not None
    arrival.session.fail(FerryError(Reason.USERFAULTFD_REFUSED, "the VMM moved its memory"))
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.FAILED
    reading = asyncio.get_running_loop().run_in_executor(None, coming.vmm.memory.read, 0, 1)
    done, _ = await asyncio.wait([reading], timeout=0.02)
    assert not done
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
    await coming.incoming.hand_over(b"state")
    await coming.incoming.commit()
    arrival = coming.incoming.arrival
    assert arrival is not None
    served = coming._pages._served.pop("m")
    lanes = arrival.session._lanes
    assert lanes is not None
    await lanes.close()
    await coming.until(lambda: coming.record.state is State.POSTCOPY_PAUSED)
    await coming.until(lambda: coming.record.error is not None and coming.record.error.reason is Reason.UNKNOWN_MIGRATION)
    coming._pages.offer(served)
    coming.incoming.reconnect()
    coming.incoming.limit(migration_pb2.Limits())
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.COMPLETED
    assert coming.incoming.view().progress.reconnects >= 1

