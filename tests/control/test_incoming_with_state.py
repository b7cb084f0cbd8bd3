"""VMMs that hand their memory over only as they load their guest's state, and guests whose memory is told that late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coming import BOOM, CONTENT, DEADLINE, STATE, Coming

from pageferry.errors import Reason
from pageferry.v1 import incoming_pb2
from pageferryd.core.lifecycle import State
from pageferryd.source.page_service import layout_to_proto

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


@pytest.fixture
async def late(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Coming]:
    coming = Coming(Path(tmp_path_factory.mktemp("r")))
    coming.vmm.memory_comes_with_state = True
    coming.vmm.takes_any_guest = True
    await coming.start()
    yield coming
    await coming.stop()


def state_with_layout(coming: Coming) -> incoming_pb2.HandOverRequest:
    return incoming_pb2.HandOverRequest(migration_id="m", state=b"state", layout=layout_to_proto(coming.vmm.layout))


async def test_its_memory_is_served_while_the_state_is_loaded(late: Coming) -> None:
    await late.prepared()
    assert late.incoming.arrival is None
    await late.incoming.hand_over(STATE)
    assert late.vmm.read == CONTENT[:1]
    await late.incoming.commit()
    await late.until(lambda: late.record.state.final)
    assert late.record.state is State.COMPLETED
    assert late.vmm.memory.read(0, len(CONTENT)) == CONTENT
    assert late.vmm.calls == ["describe", "attach_pager", "load_state", "resume", "detach_pager"]


async def test_a_layout_that_comes_with_the_state_is_as_good(late: Coming) -> None:
    await late.incoming.prepare(late.request(told_later=True))
    assert late.vmm.calls == ["describe"]
    await late.incoming.hand_over(state_with_layout(late))
    await late.incoming.commit()
    await late.until(lambda: late.record.state.final)
    assert late.record.state is State.COMPLETED
    assert late.vmm.memory.read(0, len(CONTENT)) == CONTENT


async def test_without_a_layout_there_is_nothing_to_load(late: Coming) -> None:
    await late.incoming.prepare(late.request(told_later=True))
    assert await late.refused(late.incoming.hand_over(STATE)) is Reason.LAYOUT_INVALID
    await late.incoming.abort("no")
    await late.assert_never_ran()


@pytest.mark.parametrize("step", ["attach_pager", "load_state"])
async def test_a_step_that_fails_leaves_nothing(late: Coming, step: str) -> None:
    late.vmm.failures[step] = BOOM
    if step == "attach_pager":
        assert await late.refused(late.prepared()) is Reason.NO_SPACE
    else:
        assert await late.refused(late.handed_over()) is Reason.NO_SPACE
        await late.incoming.abort("no")
    await late.assert_never_ran()


async def test_a_state_that_is_loaded_without_memory_is_refused(late: Coming) -> None:
    await late.prepared()
    late.vmm.seat = None
    assert await late.refused(late.incoming.hand_over(STATE)) is Reason.HANDOFF_TIMEOUT
    await late.incoming.abort("no")
    await late.assert_never_ran()


async def test_an_abort_before_the_state_ends_it(late: Coming) -> None:
    await late.prepared()
    await late.incoming.abort("no")
    await late.assert_never_ran()


async def test_an_abort_while_the_state_is_loaded_ends_it(late: Coming) -> None:
    gate = late.vmm.gate("load_state")
    await late.prepared()
    loading = asyncio.create_task(late.incoming.hand_over(STATE))
    await gate.until_reached()
    await asyncio.wait_for(late.incoming.abort("no"), DEADLINE)
    gate.opened.set()
    await asyncio.gather(loading, return_exceptions=True)
    await late.assert_never_ran()
