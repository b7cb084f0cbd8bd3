"""What becomes of a guest at its destination whose missing pages cannot be had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coming import STATE, Coming

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.config import Limits
from pageferryd.control.loss import LossWatch, check_policy, kills
from pageferryd.core.lifecycle import State

KILL = migration_pb2.Policy(on_loss=migration_pb2.ON_LOSS_KILL, loss_seconds=1)
WAIT = migration_pb2.Policy(on_loss=migration_pb2.ON_LOSS_WAIT, loss_seconds=1)


@pytest.mark.parametrize(
    ("given", "setting", "killed"),
    [
        (migration_pb2.ON_LOSS_UNSPECIFIED, "wait", False),
        (migration_pb2.ON_LOSS_UNSPECIFIED, "kill", True),
        (migration_pb2.ON_LOSS_WAIT, "kill", False),
        (migration_pb2.ON_LOSS_KILL, "wait", True),
    ],
)
def test_what_a_migration_says_goes_above_the_setting(given: int, setting: str, killed: bool) -> None:
    policy = migration_pb2.Policy(on_loss=migration_pb2.OnLoss.ValueType(given))
    limits = Limits.model_validate({"on_loss": setting})
    assert kills(policy, limits) is killed


@pytest.mark.parametrize(
    "policy",
    [migration_pb2.Policy(on_loss=migration_pb2.OnLoss.ValueType(9)), migration_pb2.Policy(loss_seconds=1 << 31)],
)
def test_a_policy_that_cannot_be_is_refused(policy: migration_pb2.Policy) -> None:
    check_policy(KILL)
    with pytest.raises(FerryError) as refused:
        check_policy(policy)
    assert refused.value.reason is Reason.INVALID_ARGUMENT


async def test_a_source_that_comes_back_in_time_is_not_lost() -> None:
    lost: list[FerryError] = []
    watch = LossWatch(KILL, Limits(), lost.append)
    watch.gone()
    first = watch._timer
    watch.gone()
    assert watch._timer is first, "it was given more time"
    watch.back()
    assert first is not None
    assert first.cancelled()
    watch.gone()
    while not lost:  # noqa: ASYNC110 - a callback fills it
        await asyncio.sleep(0.01)
    assert [error.reason for error in lost] == [Reason.SOURCE_LOST]


@pytest.fixture
async def coming(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Coming]:
    one = Coming(Path(tmp_path_factory.mktemp("c")))
    await one.start()
    yield one
    await one.stop()


async def lose_the_source(coming: Coming, policy: migration_pb2.Policy) -> None:
    """The guest runs here, nothing of it has come by push, and its source goes for good."""
    coming.record.policy.CopyFrom(policy)
    request = coming.request()
    request.limits.push_disabled = True
    await coming.incoming.prepare(request)
    await coming.incoming.hand_over(STATE)
    await coming.incoming.commit()
    await coming.server.stop(0)


pytestmark = pytest.mark.userfaultfd


async def test_a_guest_whose_source_is_lost_is_killed_where_its_policy_says_so(coming: Coming) -> None:
    await lose_the_source(coming, KILL)
    await coming.until(lambda: coming.record.state.final)
    assert coming.record.state is State.FAILED
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.SOURCE_LOST
    assert coming.vmm.killed
    assert coming.incoming.arrival is None
    assert not coming.incoming.committed
    assert coming.guest_is_free()


async def test_a_guest_whose_source_is_lost_waits_otherwise(coming: Coming) -> None:
    await lose_the_source(coming, WAIT)
    await coming.until(lambda: coming.record.error is not None and coming.record.error.reason is Reason.SOURCE_LOST)
    assert coming.record.state is State.POSTCOPY_PAUSED
    assert not coming.vmm.killed
    assert coming.incoming.arrival is not None
    assert coming.incoming.committed


async def test_a_guest_that_cannot_be_killed_fails_and_waits(coming: Coming) -> None:
    coming.vmm.failures["kill"] = FerryError(Reason.VMM_FAILED, "it does not end")
    await lose_the_source(coming, KILL)
    await coming.until(lambda: coming.record.state.final)
    assert coming.incoming.arrival is not None
    assert coming.incoming.committed


@pytest.mark.parametrize(("policy", "killed"), [(KILL, True), (WAIT, False)], ids=["kill", "wait"])
async def test_a_sidecar_that_cannot_go_on_does_as_the_policy_says(
    coming: Coming, policy: migration_pb2.Policy, killed: bool
) -> None:
    coming.record.policy.CopyFrom(policy)
    request = coming.request()
    request.limits.push_disabled = True
    await coming.incoming.prepare(request)
    await coming.incoming.hand_over(STATE)
    await coming.incoming.commit()
    arrival = coming.incoming.arrival
    assert arrival is not None
    arrival.session.fail(FerryError(Reason.NO_SPACE, "out of descriptors"))
    await coming.until(lambda: coming.record.state.final and coming.vmm.killed is killed)
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.NO_SPACE
    assert coming.incoming.committed is not killed


async def test_an_operator_may_give_up_a_guest_that_waits_for_a_source_that_is_gone(coming: Coming) -> None:
    await lose_the_source(coming, migration_pb2.Policy())
    await coming.until(lambda: coming.record.state is State.POSTCOPY_PAUSED)
    await coming.incoming.give_up_owned("the operator says so")
    assert coming.vmm.killed
    assert coming.record.state is State.FAILED
    assert coming.record.error is not None
    assert coming.record.error.reason is Reason.GIVEN_UP


async def test_a_guest_that_is_well_cannot_be_given_up(coming: Coming) -> None:
    await coming.handed_over()
    assert await coming.refused(coming.incoming.give_up_owned("no")) is Reason.ILLEGAL_STATE
    request_running = coming.incoming.commit()
    await request_running
    if not coming.record.state.final:
        assert await coming.refused(coming.incoming.give_up_owned("no")) is Reason.ILLEGAL_STATE
    assert not coming.vmm.killed
