"""More guests than may move at once: they wait for their turn, in order, and are seen to."""

from __future__ import annotations

import asyncio

import pytest
from crossing import COMPLETED, POSTCOPY, PREPARING, Crossing, Stage, until

from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

PENDING = pb.MIGRATION_STATE_PENDING


async def crossings(stage: Stage, count: int, **limits: int) -> list[Crossing]:
    """Guests that all go at once, the first so slowly that a test can look at the others."""
    source, destination = await asyncio.gather(
        stage.sidecar("source", limits={name: value for name, value in limits.items() if name == "max_outgoing"}),
        stage.sidecar("destination", limits={name: value for name, value in limits.items() if name == "max_incoming"}),
    )
    made = [await stage.crossing(source, destination) for _ in range(count)]
    await made[0].start(push_bytes_per_second=4 << 20)
    await made[0].becomes(made[0].at_destination, POSTCOPY)
    for crossing in made[1:]:
        await crossing.start()
    return made


async def places(made: list[Crossing]) -> list[int]:
    seen = [await crossing.seen(crossing.at_source) for crossing in made]
    return [migration.queue_position if migration is not None else -1 for migration in seen]


async def all_arrive_in_order(made: list[Crossing]) -> None:
    for crossing in made:
        await crossing.becomes(crossing.at_source, COMPLETED, seconds=30)
    ended = [await crossing.seen(crossing.at_source) for crossing in made]
    times = [migration.end_time.ToNanoseconds() for migration in ended if migration is not None]
    assert times == sorted(times)
    for crossing in made:
        await crossing.arrives()


async def test_guests_wait_at_their_source_for_those_before_them(stage: Stage) -> None:
    made = await crossings(stage, 4, max_outgoing=1)
    assert await places(made) == [0, 1, 2, 3]
    waiting = await made[2].seen(made[2].at_source)
    assert waiting is not None
    assert waiting.state == PENDING
    await made[0].at_source.set_limits(made[0].migration_id, pb.Limits())
    await all_arrive_in_order(made)


async def test_guests_wait_at_their_source_for_a_destination_without_room(stage: Stage) -> None:
    made = await crossings(stage, 3, max_incoming=1)

    async def refused() -> bool:
        waiting = await made[1].seen(made[1].at_source)
        return waiting is not None and waiting.error.reason == "TOO_MANY_MIGRATIONS"

    await until(refused, "the destination says that it has no room")
    waiting = await made[1].seen(made[1].at_source)
    assert waiting is not None
    assert waiting.state in (PENDING, PREPARING)
    await made[0].at_source.set_limits(made[0].migration_id, pb.Limits())
    await all_arrive_in_order(made)


async def test_a_guest_that_waits_for_its_turn_can_be_taken_back(stage: Stage) -> None:
    made = await crossings(stage, 3, max_outgoing=1)
    cancelled = await made[1].at_source.cancel_migration(made[1].migration_id)
    assert cancelled.state == pb.MIGRATION_STATE_CANCELLED
    await made[1].runs_at_source()
    assert await places([made[2]]) == [1]
    await made[0].at_source.set_limits(made[0].migration_id, pb.Limits())
    await made[2].arrives()
