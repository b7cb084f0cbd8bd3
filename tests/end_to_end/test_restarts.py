"""A destination's sidecar that ends in the middle, and starts again: the guest waits meanwhile, and loses nothing."""

from __future__ import annotations

import asyncio
import signal

import pytest
from crossing import FAILED, PAUSED, POSTCOPY, Crossing, Stage
from sidecar_process import Sidecar

from pageferry.errors import Reason

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


async def under_way(stage: Stage, *options: str) -> Crossing:
    """A guest whose memory comes so slowly that a test can do something meanwhile."""
    source, destination = await asyncio.gather(stage.sidecar("source"), stage.sidecar("destination", drain_seconds=0.1))
    crossing = await stage.crossing(source, destination, *options)
    await crossing.start(push_bytes_per_second=2 << 20)
    await crossing.becomes(crossing.at_destination, POSTCOPY)
    return crossing


async def started_again(stage: Stage, crossing: Crossing) -> Sidecar:
    old = crossing.destination
    again = await stage.sidecar("destination", listen=[old.address], runtime_dir=str(old.runtime_dir))
    crossing.destination, crossing.at_destination = again, await stage.client(again)
    return again


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
async def test_the_next_sidecar_fills_the_rest(stage: Stage, number: int) -> None:
    crossing = await under_way(stage)
    crossing.destination.signal(number)
    await crossing.destination.exit_code()
    again = await started_again(stage, crossing)
    await again.event("migration_taken_up")
    _, came = await crossing.arrives()
    assert came.progress.pages_present == came.progress.pages_total
    # What was in place when it was taken up did not cross once more.
    assert came.progress.push_pages + came.progress.demand_pages < came.progress.pages_total
    assert list(again.runtime_dir.iterdir()) == []


async def test_it_may_end_again_and_again(stage: Stage) -> None:
    crossing = await under_way(stage)
    for _ in range(3):
        crossing.destination.signal(signal.SIGKILL)
        await crossing.destination.exit_code()
        await started_again(stage, crossing)
        await crossing.becomes(crossing.at_destination, POSTCOPY, PAUSED)
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
    assert not (again.runtime_dir / "journal").exists()
    assert crossing.guest.alive
