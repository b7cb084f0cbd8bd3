"""How migrations and sidecars end when something is taken from them in the middle."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from crossing import COMPLETED, FAILED, PAUSED, POSTCOPY, STAY, Crossing, Stage, until
from sidecar_process import QUICK_LIMITS, Sidecar

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


async def pair(stage: Stage, **settings: object) -> tuple[Sidecar, Sidecar]:
    """Two sidecars for what would stay with them for ever."""
    source, destination = await asyncio.gather(*(stage.sidecar(name, **settings) for name in ("source", "destination")))
    return source, destination


async def half_way(stage: Stage, source: Sidecar, destination: Sidecar, *options: str, **keywords: object) -> Crossing:
    """A guest that runs at its destination, most of whose pages do not come yet."""
    crossing = await stage.crossing(source, destination, *STAY, *options, **keywords)
    await crossing.start(push_disabled=True)
    await crossing.both_become(POSTCOPY)
    await crossing.waiting.runs_on()
    return crossing


async def test_without_push_only_what_the_guest_touches_comes_until_push_is_allowed(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await half_way(stage, alpha, beta)

    async def touched_all_it_touches() -> bool:
        return await crossing.waiting.steps() > await crossing.guest.steps() + 2 * 410

    await until(touched_all_it_touches, "the guest went over its working set")
    for client in (crossing.at_source, crossing.at_destination):
        shown = await crossing.becomes(client, POSTCOPY)
        assert shown.progress.push_pages == 0
        assert shown.limits.push_disabled
    assert 0 < shown.progress.demand_pages < shown.progress.pages_total
    limited = await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    assert not limited.limits.push_disabled
    _, came = await crossing.arrives()
    assert came.progress.push_pages > 0


async def test_limits_given_while_the_destination_is_readied_are_in_force_afterwards(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, *STAY, hostile="load-slow")
    await crossing.start()
    await crossing.becomes(crossing.at_destination, pb.MIGRATION_STATE_HANDING_OVER)
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits(push_disabled=True))
    await crossing.both_become(POSTCOPY)

    async def in_force() -> bool:
        return (await crossing.at_destination.get_migration(crossing.migration_id)).limits.push_disabled

    await until(in_force, "the destination has the limits")
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.arrives()


async def test_a_push_rate_holds_push_back(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, "--working-set", "0.02", "--sparse", "0", memory="16M")
    before = (await beta.metrics())("push_paced_seconds_total")
    rate = 8 << 20
    begun = time.monotonic()
    await crossing.start(push_bytes_per_second=rate)
    looks = [look.progress async for look in crossing.at_source.watch_migration(crossing.migration_id)]
    took = time.monotonic() - begun
    pushed = [look.push_bytes for look in looks]
    assert pushed == sorted(pushed)
    # Twice as much would be no limit at all; the burst at the beginning is a second's worth at most.
    assert pushed[-1] <= rate * (took + 1)
    assert (await beta.metrics())("push_paced_seconds_total") > before
    await crossing.arrives()


# A sidecar that is told to end


@pytest.mark.parametrize("end", ["source", "destination"])
async def test_sigterm_sees_a_migration_through_and_takes_nothing_new(stage: Stage, alpha: Sidecar, end: str) -> None:
    other = await stage.sidecar(end)
    crossing = await half_way(stage, *((other, alpha) if end == "source" else (alpha, other)))
    client = crossing.at_source if end == "source" else crossing.at_destination
    second = await stage.guest("second")
    await client.register_guest("second", second.socket_path)

    other.signal(signal.SIGTERM)

    async def unready() -> bool:
        return (await other.get("/readyz"))[0] == 503

    await until(unready, "readyz says 503")
    assert (await other.get("/healthz"))[0] == 200
    with pytest.raises(FerryError) as caught:
        await client.start_migration("second", "127.0.0.1:9", request_id="late")
    assert caught.value.reason is Reason.SHUTTING_DOWN
    assert other.alive
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    assert await other.exit_code() == 0
    await crossing.waiting.runs_on()
    await crossing.waiting.is_intact()
    await crossing.guest.exit_code()
    stays = crossing.at_destination if end == "source" else crossing.at_source
    await crossing.becomes(stays, COMPLETED)


async def test_a_destination_that_drains_refuses_guests(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    draining = await stage.sidecar("draining")
    first = await half_way(stage, alpha, draining)
    second = await stage.crossing(alpha, draining)
    draining.signal(signal.SIGTERM)
    await draining.event("draining")
    await second.start()
    await second.fails(Reason.SHUTTING_DOWN)
    await first.at_source.set_limits(first.migration_id, pb.Limits())
    assert await draining.exit_code() == 0


@pytest.mark.parametrize("end", ["source", "destination"])
async def test_a_sidecar_that_may_not_wait_any_longer_leaves_the_guest_waiting_and_whole(
    stage: Stage, end: str
) -> None:
    source, destination = await pair(stage, drain_seconds=0.2)
    crossing = await half_way(stage, source, destination)
    assert await (source if end == "source" else destination).terminate() == 0
    stays = crossing.at_destination if end == "source" else crossing.at_source
    await crossing.becomes(stays, PAUSED)
    # The source never runs it again, and does not let its memory go.
    assert crossing.guest.alive
    assert (await crossing.guest.status())["state"] == "paused"
    assert crossing.waiting.wrongs == []


async def test_sigterm_before_the_handover_leaves_the_guest_at_its_source(stage: Stage, beta: Sidecar) -> None:
    source = await stage.sidecar("source", drain_seconds=0.2)
    crossing = await stage.crossing(source, beta, hostile="load-hangs")
    await crossing.start()
    await crossing.becomes(crossing.at_destination, pb.MIGRATION_STATE_HANDING_OVER)
    assert await source.terminate() == 0
    await crossing.guest.runs_on()
    there = await crossing.becomes(crossing.at_destination, FAILED)
    assert there.error.reason == Reason.ABORTED_BY_SOURCE
    await crossing.waiting.exit_code()


# Somebody is killed


async def test_a_vmm_killed_while_its_memory_comes_ends_the_guest_and_the_source_never_runs_it(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await half_way(stage, alpha, beta)
    steps = await crossing.guest.steps()
    crossing.waiting.process.kill()
    for shown in await crossing.both_become(FAILED):
        assert shown.error.reason == Reason.VMM_GONE
    status = await crossing.guest.status()
    assert (status["state"], status["steps"]) == ("paused", steps)
    # Nor is it moved on from there.
    await crossing.start()
    again = await crossing.becomes(crossing.at_source, FAILED)
    assert again.error.reason == Reason.GUEST_NOT_RUNNING


async def test_a_vmm_that_dies_as_it_is_to_run_its_guest_fails_it_at_both_ends(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile="resume-dies")
    await crossing.start()
    for shown in await crossing.both_become(FAILED):
        assert shown.error.reason == Reason.VMM_GONE
    assert (await crossing.guest.status())["state"] == "paused"


async def test_a_vmm_that_does_not_run_its_guest_yet_is_asked_again(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile="resume-fails-twice")
    await crossing.start()
    await crossing.arrives()


@pytest.mark.parametrize("backing", ["anonymous", "shmem"])
async def test_a_source_vmm_killed_while_its_memory_leaves_gives_nobody_zeroes(stage: Stage, backing: str) -> None:
    source, destination = await pair(stage)
    crossing = await half_way(stage, source, destination, "--backing", backing, waiting_options=("--backing", backing))
    crossing.guest.process.kill()
    await crossing.guest.exit_code()
    fds = destination.fds["socket"]
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    if backing == "shmem":
        # The sidecar holds the memory file itself.
        await crossing.both_become(COMPLETED)
        await crossing.waiting.runs_on()
        await crossing.waiting.is_intact()
        return
    for shown in await crossing.both_become(PAUSED):
        assert shown.error.reason == Reason.SOURCE_LOST
        assert "source" in shown.error.message

    async def tried_again_for_long() -> bool:
        lost = [event for event in destination.events if event.get("event") == "lanes_lost"]
        assert len(lost) < 20, "it knocks at the source's door without a pause"
        return any(event["retry_in"] == QUICK_LIMITS["reconnect_max_seconds"] for event in lost)

    await until(tried_again_for_long, "it asks less and less often")
    assert crossing.waiting.wrongs == []
    assert destination.fds["socket"] <= fds + 2


@pytest.mark.parametrize("end", ["source", "destination"])
async def test_a_sidecar_killed_while_memory_moves_leaves_the_guest_waiting_and_whole(stage: Stage, end: str) -> None:
    source, destination = await pair(stage)
    crossing = await half_way(stage, source, destination)
    (source if end == "source" else destination).process.kill()
    stays = crossing.at_destination if end == "source" else crossing.at_source
    await crossing.becomes(stays, PAUSED)
    assert (await crossing.guest.status())["state"] == "paused"
    # Every byte is asked for: the check cannot end, and finds nothing wrong either.
    since = len(crossing.waiting.events)
    crossing.waiting.say("verify")
    with pytest.raises(AssertionError, match="no verified"):
        await asyncio.to_thread(crossing.waiting.wait_event, "verified", since, seconds=0.5)
    assert crossing.waiting.wrongs == []


async def test_a_source_vmm_that_does_not_end_does_not_take_the_guest_back(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile_source="kill-refuses", memory="8M")
    await crossing.start()
    await crossing.becomes(crossing.at_destination, COMPLETED)
    await crossing.waiting.is_intact()
    await crossing.becomes(crossing.at_source, COMPLETED, FAILED)
    assert (await crossing.guest.status())["state"] == "paused"


async def test_a_vmm_that_does_not_let_its_userfaultfd_go_is_complete_all_the_same(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta, hostile="detach-fails", memory="8M")
    await crossing.start()
    await crossing.arrives()
