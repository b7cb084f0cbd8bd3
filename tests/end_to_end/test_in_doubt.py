"""A host that is gone for good in the middle: nobody runs the guest twice, and an operator decides."""

from __future__ import annotations

import asyncio
import shutil
import signal

import pytest
from crossing import FAILED, PAUSED, POSTCOPY, STAY, Crossing, Stage
from sidecar_process import Sidecar, free_port

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

RUN_AT_SOURCE, GIVE_UP = pb.DECISION_RUN_AT_SOURCE, pb.DECISION_GIVE_UP


async def host(stage: Stage, name: str) -> Sidecar:
    return await stage.sidecar(
        name, listen=[f"127.0.0.1:{free_port()}"], lane_listen=f"127.0.0.1:{free_port()}", drain_seconds=0.1
    )


async def again(stage: Stage, old: Sidecar) -> Sidecar:
    return await stage.sidecar(
        old.name, listen=[old.address], lane_listen=old.lanes, runtime_dir=str(old.runtime_dir), drain_seconds=0.1
    )


async def under_way(stage: Stage, **policy: int) -> Crossing:
    """A guest at its destination, most of whose memory is at its source and does not come by itself."""
    source, destination = await asyncio.gather(host(stage, "source"), host(stage, "destination"))
    crossing = await stage.crossing(source, destination, *STAY)
    await crossing.start(push_disabled=True, policy=pb.Policy(**policy))
    await crossing.becomes(crossing.at_destination, POSTCOPY)
    await crossing.becomes(crossing.at_source, POSTCOPY)
    return crossing


async def refused(call: object) -> Reason:
    with pytest.raises(FerryError) as caught:
        await call  # type: ignore[misc]
    return caught.value.reason


async def test_a_guest_whose_destination_is_gone_for_good_runs_on_at_its_source_once_an_operator_says_so(
    stage: Stage,
) -> None:
    crossing = await under_way(stage)
    lost, waiting = crossing.destination, crossing.waiting
    assert waiting is not None
    for one in (lost, waiting):
        one.process.kill()
        await one.exit_code()
    await crossing.becomes(crossing.at_source, PAUSED)
    here, there = await crossing.at_source.resolve_migration(crossing.migration_id)
    assert (here.role, here.handed_over, here.vmm_activity) == (pb.ROLE_SOURCE, True, "paused")
    assert (there.role, there.reachable) == (pb.ROLE_DESTINATION, False)
    decide = crossing.at_source.resolve_migration
    assert await refused(decide(crossing.migration_id, RUN_AT_SOURCE)) is Reason.IN_DOUBT
    assert (await crossing.guest.status())["state"] == "paused"
    # A host that comes back without a memory of it is no proof either.
    shutil.rmtree(lost.runtime_dir)
    await again(stage, lost)
    assert await refused(decide(crossing.migration_id, RUN_AT_SOURCE)) is Reason.IN_DOUBT
    await decide(crossing.migration_id, RUN_AT_SOURCE, peer_fenced=True)
    await crossing.runs_at_source()
    await crossing.guest.is_intact()
    shown = await crossing.becomes(crossing.at_source, FAILED)
    assert shown.error.reason == Reason.GIVEN_UP


async def test_a_guest_whose_source_is_gone_for_longer_than_its_policy_allows_is_killed_and_sees_no_zeroes(
    stage: Stage,
) -> None:
    crossing = await under_way(stage, on_loss=pb.ON_LOSS_KILL, loss_seconds=1)
    assert crossing.waiting is not None
    crossing.source.signal(signal.SIGKILL)
    await crossing.source.exit_code()
    failed = await crossing.becomes(crossing.at_destination, FAILED)
    assert failed.error.reason == Reason.SOURCE_LOST
    await crossing.waiting.exit_code()
    assert crossing.waiting.wrongs == []
    # What the source has is all that is left of it: as it was when it left.
    source = await again(stage, crossing.source)
    at_source = await stage.client(source)
    shown = await crossing.becomes(at_source, FAILED)
    assert shown.error.reason == Reason.SOURCE_LOST
    await at_source.resolve_migration(crossing.migration_id, RUN_AT_SOURCE)
    await crossing.guest.runs_on()
    await crossing.guest.is_intact()


async def test_a_guest_that_waits_for_a_source_that_is_gone_can_be_given_up_by_an_operator(stage: Stage) -> None:
    crossing = await under_way(stage)
    assert crossing.waiting is not None
    decide = crossing.at_destination.resolve_migration
    assert await refused(decide(crossing.migration_id, GIVE_UP)) is Reason.ILLEGAL_STATE
    crossing.source.signal(signal.SIGKILL)
    await crossing.source.exit_code()
    await crossing.becomes(crossing.at_destination, PAUSED)
    here, there = await decide(crossing.migration_id, GIVE_UP)
    assert (here.role, here.handed_over, here.state) == (pb.ROLE_DESTINATION, False, FAILED)
    assert not there.reachable
    await crossing.waiting.exit_code()
    assert crossing.waiting.wrongs == []


async def test_either_end_shows_what_both_know_while_all_is_well(stage: Stage) -> None:
    crossing = await under_way(stage)
    for client, first in ((crossing.at_source, pb.ROLE_SOURCE), (crossing.at_destination, pb.ROLE_DESTINATION)):
        ends = await client.resolve_migration(crossing.migration_id)
        assert ends[0].role == first
        by_role = {end.role: end for end in ends}
        assert by_role[pb.ROLE_SOURCE].handed_over
        assert by_role[pb.ROLE_DESTINATION].handed_over
        assert by_role[pb.ROLE_DESTINATION].pages_missing > 0
        assert {end.host for end in ends} == {"source", "destination"}
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.arrives()


async def test_a_guest_crosses_with_checksums(stage: Stage) -> None:
    source, destination = await asyncio.gather(host(stage, "source"), host(stage, "destination"))
    crossing = await stage.crossing(source, destination)
    await crossing.start(policy=pb.Policy(checksums=True))
    left, came = await crossing.arrives()
    assert left.policy.checksums
    assert came.policy.checksums
    assert came.progress.checksum_mismatches == 0
