"""A running guest crosses from one host to another, and nothing of it is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from child import DEADLINE
from crossing import COMPLETED, STAY, Stage, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sidecar_process import Sidecar

from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

CROSSINGS = [
    pytest.param("process", "anonymous", "32M", id="process-anonymous"),
    pytest.param("process", "shmem", "32M", id="process-shmem"),
    pytest.param("kvm", "anonymous", "32M", id="kvm-anonymous", marks=pytest.mark.kvm),
    pytest.param("kvm", "shmem", "32M", id="kvm-shmem", marks=pytest.mark.kvm),
]


@pytest.mark.parametrize(("kind", "backing", "memory"), CROSSINGS)
async def test_a_guest_goes_on_at_the_destination_with_all_its_memory_and_needs_no_sidecar(
    stage: Stage, alpha: Sidecar, beta: Sidecar, kind: str, backing: str, memory: str
) -> None:
    backed = ("--backing", backing)
    crossing = await stage.crossing(alpha, beta, *backed, waiting_options=backed, kind=kind, memory=memory)
    await crossing.guest.runs_on()
    before = await crossing.guest.steps()
    fds = beta.fds

    await crossing.start()
    left, came = await crossing.arrives()

    assert await crossing.waiting.steps() > before
    pages = (32 << 20) // 4096
    for shown in (left, came):
        assert shown.progress.pages_total == pages
        assert shown.progress.pages_present == pages
        assert shown.progress.demand_pages + shown.progress.push_pages == pages
        assert shown.progress.pages_poisoned == shown.progress.faults_waiting == 0
        assert not shown.HasField("error")
        assert shown.postcopy_duration.ToTimedelta().total_seconds() > 0
    assert left.downtime.ToTimedelta().total_seconds() > 0
    assert (left.role, came.role) == (pb.ROLE_SOURCE, pb.ROLE_DESTINATION)
    assert crossing.guest_id not in [guest.guest_id for guest in await crossing.at_source.list_guests()]

    async def nothing_held() -> bool:
        return beta.fds == fds

    await until(nothing_held, f"the destination holds {fds} again")
    assert beta.left_behind == []
    assert "anon_inode:[userfaultfd]" not in crossing.waiting.fds


async def test_metrics_of_both_hosts_tell_of_the_migration(stage: Stage) -> None:
    source, destination = await asyncio.gather(stage.sidecar("source"), stage.sidecar("destination"))
    crossing = await stage.crossing(source, destination)
    await crossing.start()
    left, came = await crossing.arrives()

    sent, taken = await source.metrics(), await destination.metrics()
    assert sent("migrations", role="source", state="completed") == 1
    assert taken("migrations", role="destination", state="completed") == 1
    pages = left.progress.pages_total
    assert taken("pages_total") == pages
    assert sent("served_pages_total") >= pages
    assert sent("served_pages_total", kind="zero") > 0
    assert sent("served_bytes_total") >= 4096 * taken("pages_total", kind="raw")
    assert taken("received_bytes_total", lane="push") == came.progress.push_bytes
    assert taken("faults_total", door="uffd") == came.progress.faults > 0
    assert taken("fault_latency_seconds_count", stage="total") > 0
    for one in (sent, taken):
        assert one("last_migration_pages") == pages
        assert one("last_migration_postcopy_seconds") > 0
    assert sent("last_migration_downtime_seconds") > 0
    assert taken("pages_missing") == taken("faults_waiting") == taken("push_under_way_bytes") == 0


async def test_the_guest_runs_on_when_the_sidecar_of_its_new_host_ends(stage: Stage, alpha: Sidecar) -> None:
    destination = await stage.sidecar("destination")
    crossing = await stage.crossing(alpha, destination)
    await crossing.start()
    await crossing.arrives()

    assert await destination.terminate() == 0

    await crossing.waiting.runs_on()
    await crossing.waiting.is_intact()


async def test_a_guest_can_be_moved_to_and_fro(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await stage.crossing(alpha, beta, *STAY)
    at = crossing.at_source, crossing.at_destination
    guest_id = crossing.guest_id
    for turn in range(3):
        await crossing.start()
        await crossing.arrives()
        if turn == 2:
            break
        crossing.guest = crossing.waiting
        crossing.source, crossing.destination = crossing.destination, crossing.source
        crossing.at_source, crossing.at_destination = crossing.at_destination, crossing.at_source
        crossing.waiting = await stage.guest(f"again-{turn}", "--incoming")
        await stage.register(crossing.at_destination, guest_id, crossing.waiting)
    # Each host knows all three, newest first.
    for client in at:
        listed = await client.list_migrations(guest_id)
        assert [one.state for one in listed] == [COMPLETED] * 3
        assert listed[0].create_time.ToNanoseconds() >= listed[-1].create_time.ToNanoseconds()


async def test_several_guests_cross_at_once_in_both_directions(stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossings = await asyncio.gather(
        *(stage.crossing(*way, *STAY, memory="8M") for way in ((alpha, beta), (beta, alpha), (alpha, beta)))
    )
    await asyncio.gather(*(crossing.start() for crossing in crossings))
    await asyncio.gather(*(crossing.arrives() for crossing in crossings))


async def test_pages_cross_over_unix_sockets(stage: Stage, short_path: Path) -> None:
    source, destination = await asyncio.gather(
        *(stage.sidecar(name, listen=[f"unix:{short_path}/{name}.sock"]) for name in ("source", "destination"))
    )
    crossing = await stage.crossing(source, destination)
    left = await crossing.start()
    assert left.destination_address == f"unix:{short_path}/destination.sock"
    await crossing.arrives()


async def test_whoever_watches_sees_the_states_in_their_order_and_the_last_one(
    stage: Stage, alpha: Sidecar, beta: Sidecar
) -> None:
    crossing = await stage.crossing(alpha, beta)
    migration = await crossing.start()
    seen = [look async for look in crossing.at_source.watch_migration(migration.migration_id)]

    states = [look.state for look in seen]
    assert states == sorted(states)
    assert {pb.MIGRATION_STATE_POSTCOPY, COMPLETED} <= set(states)
    assert states.count(COMPLETED) == 1
    present = [look.progress.pages_present for look in seen]
    assert present == sorted(present)
    assert present[-1] == seen[-1].progress.pages_total
    # And again, when it is over, at both ends: one look.
    for client in (crossing.at_source, crossing.at_destination):
        looks = [look async for look in client.watch_migration(migration.migration_id)]
        assert [look.state for look in looks] == [COMPLETED]


async def test_health_and_reflection_answer(alpha: Sidecar) -> None:
    async with grpc.aio.insecure_channel(alpha.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "pageferry.v1.MigrationService", "pageferry.v1.PageService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([asked]), timeout=DEADLINE)]
        listed = {service.name for service in answers[0].list_services_response.service}
    assert {f"pageferry.v1.{name}Service" for name in ("Migration", "Incoming", "Page")} <= listed
    assert (await alpha.get("/healthz"))[0] == (await alpha.get("/readyz"))[0] == 200
