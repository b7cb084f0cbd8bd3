"""A sidecar that ends in the middle, and starts again: the guest waits meanwhile, and loses nothing."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from crossing import FAILED, PAUSED, POSTCOPY, Crossing, Stage, until
from sidecar_process import Sidecar

from pageferry.errors import Reason

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


ENDS = ["source", "destination"]


async def under_way(stage: Stage, *options: str, **keywords: Any) -> Crossing:
    """A guest whose memory comes so slowly that a test can do something meanwhile."""
    source, destination = await asyncio.gather(
        stage.sidecar("source", drain_seconds=0.1), stage.sidecar("destination", drain_seconds=0.1)
    )
    crossing = await stage.crossing(source, destination, *options, **keywords)
    await crossing.start(push_bytes_per_second=2 << 20)
    await crossing.becomes(crossing.at_destination, POSTCOPY)
    await crossing.becomes(crossing.at_source, POSTCOPY)
    return crossing


async def started_again(stage: Stage, crossing: Crossing, end: str = "destination") -> Sidecar:
    """Start the sidecar of one end once more, where the first one was."""
    old = crossing.source if end == "source" else crossing.destination
    lanes = {"lane_listen": old.lanes} if old.lanes else {}
    again = await stage.sidecar(end, listen=[old.address], runtime_dir=str(old.runtime_dir), drain_seconds=0.1, **lanes)
    client = await stage.client(again)
    if end == "source":
        crossing.source, crossing.at_source = again, client
    else:
        crossing.destination, crossing.at_destination = again, client
    return again


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
async def test_the_next_sidecar_goes_on(stage: Stage, number: int, end: str) -> None:
    crossing = await under_way(stage)
    old = crossing.source if end == "source" else crossing.destination
    old.signal(number)
    await old.exit_code()
    again = await started_again(stage, crossing, end)
    await again.event("migration_taken_up")
    _, came = await crossing.arrives()
    assert came.progress.pages_present == came.progress.pages_total
    for sidecar in (crossing.source, crossing.destination):
        assert list(sidecar.runtime_dir.iterdir()) == []


async def test_pages_that_are_in_place_do_not_cross_again_for_a_destination_that_starts_again(stage: Stage) -> None:
    crossing = await under_way(stage)

    async def some_came() -> bool:
        return (await crossing.at_destination.get_migration(crossing.migration_id)).progress.pages_present > 0

    await until(some_came, "some pages are in place")
    crossing.destination.signal(signal.SIGKILL)
    await crossing.destination.exit_code()
    await started_again(stage, crossing)
    _, came = await crossing.arrives()
    assert came.progress.push_pages + came.progress.demand_pages < came.progress.pages_total


@pytest.mark.parametrize("end", ENDS)
async def test_it_may_end_again_and_again(stage: Stage, end: str) -> None:
    crossing = await under_way(stage)
    for _ in range(3):
        old = crossing.source if end == "source" else crossing.destination
        old.signal(signal.SIGKILL)
        await old.exit_code()
        await started_again(stage, crossing, end)
        await crossing.becomes(crossing.at_destination, POSTCOPY, PAUSED)
    await crossing.arrives()


@pytest.mark.kvm
async def test_memory_that_no_userfaultfd_sees_is_taken_again(stage: Stage) -> None:
    backed = ("--backing", "guest_memfd")
    crossing = await under_way(stage, *backed, waiting_options=backed, kind="kvm")
    for _ in range(2):
        crossing.destination.signal(signal.SIGKILL)
        await crossing.destination.exit_code()
        await started_again(stage, crossing)
    await crossing.arrives()


async def test_both_may_end_at_once(stage: Stage) -> None:
    crossing = await under_way(stage)
    for sidecar in (crossing.source, crossing.destination):
        sidecar.signal(signal.SIGKILL)
        await sidecar.exit_code()
    for end in ENDS:
        await started_again(stage, crossing, end)
    await crossing.arrives()


async def test_a_vmm_that_ended_meanwhile_is_said_so_at_both_ends(stage: Stage) -> None:
    crossing = await under_way(stage)
    crossing.destination.signal(signal.SIGKILL)
    await crossing.destination.exit_code()
    assert crossing.waiting is not None
    crossing.waiting.process.kill()
    await crossing.waiting.exit_code()
    again = await started_again(stage, crossing)
    for client in (crossing.at_destination, crossing.at_source):
        shown = await crossing.becomes(client, FAILED)
        assert shown.error.reason == Reason.VMM_GONE
    # A source that was away would ask later.
    assert [path.suffix for path in (again.runtime_dir / "journal.d").iterdir()] == [".lost"]
    assert crossing.guest.alive
