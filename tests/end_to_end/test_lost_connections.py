"""A lost connection: the guest waits, nothing is lost, and the migration goes on by itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from crossing import PAUSED, POSTCOPY, STAY, Crossing, Stage, until
from sidecar_process import Sidecar
from tcp_proxy import TcpProxy

from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

LOSSES = {Reason.SOURCE_UNREACHABLE, Reason.LANE_LOST}


@pytest.fixture
async def proxy() -> AsyncIterator[TcpProxy]:
    async with TcpProxy() as made:
        yield made


async def behind(stage: Stage, proxy: TcpProxy, *options: str, memory: str = "16M", **limits: Any) -> Crossing:
    """A guest whose destination reaches its pages through the proxy only."""
    source, destination = await asyncio.gather(
        stage.sidecar("source", advertise=proxy.address, lane_sockets=False),
        stage.sidecar("destination", limits=limits),
    )
    proxy.target = source.address
    return await stage.crossing(source, destination, *options, memory=memory)


async def waits(crossing: Crossing) -> None:
    """Wait until the guest does nothing any more: it has touched a page that does not come."""
    assert crossing.waiting is not None
    stalled = await crossing.waiting.event(
        "progress", len(crossing.waiting.events), lambda event: event["longest_stall_ms"] > 300
    )
    assert await crossing.waiting.steps() == stalled["steps"]


async def test_a_cut_connection_pauses_the_migration_and_it_goes_on_by_itself(stage: Stage, proxy: TcpProxy) -> None:
    crossing = await behind(stage, proxy)
    proxy.cut_after = 2 << 20
    await crossing.start()

    for shown in await crossing.both_become(PAUSED):
        assert shown.error.reason in LOSSES
        assert 0 < shown.progress.pages_present < shown.progress.pages_total
    await waits(crossing)
    assert (await crossing.destination.metrics())("migrations", role="destination", state="postcopy_paused") == 1

    proxy.heal()
    left, came = await crossing.arrives()
    for shown in (left, came):
        assert shown.progress.reconnects == 1
        assert not shown.HasField("error")
    assert (await crossing.destination.metrics())("lane_reconnects_total") == 1


async def test_a_connection_may_be_cut_again_and_again(stage: Stage, proxy: TcpProxy) -> None:
    crossing = await behind(stage, proxy, reconnect_max_seconds=0.1)
    proxy.cut_after = 1 << 20
    await crossing.start()
    for cuts in range(1, 5):
        await crossing.becomes(crossing.at_destination, PAUSED)
        proxy.heal()
        proxy.cut_after = proxy.forwarded + (1 << 20)

        async def cut_again(cuts: int = cuts) -> bool:
            shown = await crossing.at_destination.get_migration(crossing.migration_id)
            return shown.state == PAUSED and shown.progress.reconnects >= cuts

        await until(cut_again, f"cut for the {cuts + 1}th time")
    proxy.heal()
    _, came = await crossing.arrives()
    assert came.progress.reconnects >= 5


@pytest.mark.parametrize("end", ["source", "destination"])
async def test_resuming_by_hand_does_not_wait_for_the_backoff(stage: Stage, proxy: TcpProxy, end: str) -> None:
    # With such a backoff it would not be over before the test's deadline.
    crossing = await behind(stage, proxy, reconnect_initial_seconds=600.0, reconnect_max_seconds=600.0)
    proxy.cut_after = 1 << 20
    await crossing.start()
    await crossing.both_become(PAUSED)
    proxy.heal()
    client = crossing.at_source if end == "source" else crossing.at_destination
    await client.resume_migration(crossing.migration_id)
    await crossing.arrives()


async def test_a_black_hole_is_noticed_and_healed(stage: Stage, proxy: TcpProxy) -> None:
    crossing = await behind(stage, proxy, lane_silence_timeout=0.4)
    await crossing.start(push_bytes_per_second=1 << 20)
    await crossing.both_become(POSTCOPY)
    proxy.stall()
    for shown in await crossing.both_become(PAUSED):
        assert shown.error.reason in {Reason.LANE_SILENT, *LOSSES}
    await waits(crossing)
    proxy.heal()
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.arrives()


async def test_a_source_that_is_away_at_the_end_is_still_told_that_all_has_come(stage: Stage, proxy: TcpProxy) -> None:
    """Complete is a message of its own: a source that misses it keeps the guest's memory."""
    crossing = await behind(stage, proxy, *STAY)
    await crossing.start(push_disabled=True)
    await crossing.both_become(POSTCOPY)

    async def demand_is_still() -> bool:
        progress = (await crossing.at_destination.get_migration(crossing.migration_id)).progress
        return progress.demand_pages > 0 and progress.faults_waiting == 0

    await until(demand_is_still, "the guest has touched what it touches")
    proxy.cut()
    await crossing.both_become(PAUSED)
    assert crossing.guest.alive
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.becomes(crossing.at_destination, PAUSED)
    assert crossing.guest.alive
    proxy.heal()
    await crossing.arrives()


async def test_a_destination_sidecar_that_is_stopped_for_a_while_loses_nothing(stage: Stage, alpha: Sidecar) -> None:
    """As when a debugger or a frozen cgroup holds it: faults queue in the kernel."""
    destination = await stage.sidecar("destination")
    crossing = await stage.crossing(alpha, destination)
    await crossing.start(push_bytes_per_second=1 << 20)
    await crossing.both_become(POSTCOPY)
    destination.signal(signal.SIGSTOP)
    await waits(crossing)
    destination.signal(signal.SIGCONT)
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.arrives()
