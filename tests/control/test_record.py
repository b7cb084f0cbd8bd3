"""A migration's record: its end is noted once, and whoever waits for a change is woken."""

from __future__ import annotations

import asyncio

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control.record import Changes, MigrationRecord
from pageferryd.core.errors import IllegalTransitionError
from pageferryd.core.lifecycle import State

DEADLINE = 10.0
BOOM = FerryError(Reason.NO_SPACE, "no room")


@pytest.fixture
def record() -> MigrationRecord:
    return MigrationRecord("m", "r", "g", migration_pb2.ROLE_SOURCE, "a", "b", "b:1", migration_pb2.Limits())


def test_a_failure_ends_it_with_its_reason_and_time(record: MigrationRecord) -> None:
    assert record.state is State.PENDING
    assert record.ended is None
    record.fail(BOOM)
    assert record.state is State.FAILED
    assert record.error is not None
    assert (record.error.reason, record.error.message) == (BOOM.reason, BOOM.message)
    assert record.ended is not None
    assert record.ended >= record.created


def test_an_end_is_the_end(record: MigrationRecord) -> None:
    record.lifecycle.to(State.CANCELLED)
    ended = record.ended
    record.fail(BOOM)
    assert record.state is State.CANCELLED
    assert record.error is None
    assert record.ended == ended
    with pytest.raises(IllegalTransitionError):
        record.lifecycle.to(State.PREPARING)


def test_trouble_comes_and_goes_without_an_end(record: MigrationRecord) -> None:
    record.trouble(BOOM)
    assert record.error is not None
    assert (record.error.reason, record.error.message) == (BOOM.reason, BOOM.message)
    record.trouble(None)
    assert record.error is None
    assert record.state is State.PENDING


@pytest.mark.parametrize(
    "change", [lambda one: one.lifecycle.to(State.PREPARING), lambda one: one.fail(BOOM), lambda one: one.trouble(BOOM)]
)
async def test_everybody_who_waits_is_woken_by_a_change(record: MigrationRecord, change: object) -> None:
    waiting = [asyncio.create_task(record.changes.wait(1000)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    assert callable(change)
    change(record)
    await asyncio.wait_for(asyncio.gather(*waiting), DEADLINE)


async def test_a_change_nobody_waits_for_wakes_nobody_later() -> None:
    changes = Changes()
    changes.notify()
    waiting = asyncio.create_task(changes.wait(1000))
    await asyncio.sleep(0)
    assert not waiting.done()
    changes.notify()
    await asyncio.wait_for(waiting, DEADLINE)


async def test_a_wait_ends_by_itself_and_leaves_others_waiting() -> None:
    changes = Changes()
    patient = asyncio.create_task(changes.wait(1000))
    await asyncio.wait_for(changes.wait(0.01), DEADLINE)
    assert not patient.done()
    cancelled = asyncio.create_task(changes.wait(1000))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    changes.notify()
    await asyncio.wait_for(patient, DEADLINE)
