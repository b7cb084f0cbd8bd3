"""The destination's part of a migration until its commit: prepared, handed over, or given up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest
from coming import BOOM, CONTENT, DEADLINE, STATE, Coming
from stand_in_vmm import PAGES

from pageferry.errors import Reason
from pageferry.v1 import incoming_pb2, memory_pb2
from pageferryd.control import collapsing
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.lifecycle import State
from pageferryd.vmm.driver import Activity

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


async def test_the_result_says_how_much_is_mapped_by_huge_pages_again(
    coming: Coming, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsed: list[tuple[int, list[tuple[int, int]]]] = []
    monkeypatch.setattr(collapsing, "collapse", lambda pid, spans: collapsed.append((pid, spans)))
    monkeypatch.setattr(collapsing, "big_bytes", lambda _pid, _spans: 2 << 20)
    await coming.handed_over()
    await coming.incoming.commit()
    await coming.until(lambda: coming.record.state.final)
    assert coming.incoming.view().progress.huge_bytes == 2 << 20
    assert collapsed == [(os.getpid(), [(coming.vmm.memory.address, len(CONTENT))])]


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


REFUSED: dict[str, tuple[Callable[[Coming], incoming_pb2.PrepareRequest], Reason]] = {
    "another size": (lambda one: one.request(layout=Layout([Region(0, PAGE_SIZE)])), Reason.LAYOUT_MISMATCH),
    "no regions": (
        lambda one: incoming_pb2.PrepareRequest(driver="stand-in", layout=memory_pb2.MemoryLayout()),
        Reason.LAYOUT_INVALID,
    ),
    "another kind of VMM": (lambda one: one.request(driver="qemu"), Reason.VMM_MISMATCH),
    "another machine": (lambda one: one.request(machine="pc-q35-7.2"), Reason.VMM_MISMATCH),
    "another token": (lambda one: one.request(token=bytes(32)), Reason.TOKEN_INVALID),
    "nobody there": (lambda one: one.request(address="unix:/nowhere"), Reason.SOURCE_UNREACHABLE),
    "no address": (lambda one: one.request(address="::::"), Reason.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_prepared_is_given_up_with_its_reason(coming: Coming, case: str) -> None:
    request, reason = REFUSED[case]
    assert await coming.refused(coming.incoming.prepare(request(coming))) is reason
    await coming.assert_never_ran()
    # A VMM that nothing was done to can wait for another guest.
    assert not coming.vmm.killed
    assert "attach_pager" not in coming.vmm.calls


async def test_a_vmm_that_runs_is_no_destination(coming: Coming) -> None:
    coming.vmm.activity = Activity.RUNNING
    assert await coming.refused(coming.prepared()) is Reason.GUEST_NOT_INCOMING
    assert coming.record.state is State.FAILED
    assert not coming.vmm.killed
    assert coming.guest_is_free()


@pytest.mark.parametrize("step", ["describe", "attach_pager"])
@pytest.mark.parametrize("failure", [BOOM, OSError("odd")])
async def test_a_vmm_that_fails_while_it_is_prepared_is_given_up(coming: Coming, step: str, failure: Exception) -> None:
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
    assert await coming.refused(coming.incoming.hand_over(STATE)) is Reason.ILLEGAL_STATE
    await coming.assert_never_ran()


async def test_an_abort_does_not_wait_for_a_state_that_hangs(coming: Coming) -> None:
    gate = coming.vmm.gate("load_state")
    await coming.prepared()
    loading = asyncio.create_task(coming.incoming.hand_over(STATE))
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
    assert await coming.refused(coming.incoming.hand_over(STATE)) is Reason.NO_SPACE
    await coming.incoming.abort("no")
    await coming.assert_never_ran()
