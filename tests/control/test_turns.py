"""Whose turn it is: in the order of asking, so many at once, and around destinations that have no room."""

from __future__ import annotations

import asyncio

import pytest

from pageferry.v1 import migration_pb2
from pageferryd.control.record import MigrationRecord
from pageferryd.control.turns import Turn, Turns


def record(name: str, destination: str = "b:1") -> MigrationRecord:
    return MigrationRecord(name, "", "g", migration_pb2.ROLE_SOURCE, "a", "b", destination, migration_pb2.Limits())


class Queue:
    """Migrations that ask for turns, in order."""

    def __init__(self, most: int) -> None:
        self.turns = Turns(most)
        self.asking: dict[str, asyncio.Task[Turn]] = {}
        self.records: dict[str, MigrationRecord] = {}

    async def ask(self, *names: str, destination: str = "b:1") -> None:
        for name in names:
            self.records[name] = record(name, destination)
            self.asking[name] = asyncio.create_task(self.turns.take(self.records[name]))
        await self.settled()

    async def settled(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def go(self) -> list[str]:
        return [name for name, task in self.asking.items() if task.done()]

    def positions(self) -> dict[str, int]:
        return {name: one.queue_position for name, one in self.records.items() if one.queue_position}

    async def end(self, name: str) -> None:
        self.turns.give_back(self.asking.pop(name).result())
        await self.settled()

    async def leave(self) -> None:
        for task in self.asking.values():
            task.cancel()
        await asyncio.gather(*self.asking.values(), return_exceptions=True)


async def test_so_many_go_at_once_and_the_others_wait_in_order() -> None:
    queue = Queue(2)
    await queue.ask("a", "b", "c", "d")
    assert queue.go() == ["a", "b"]
    assert queue.positions() == {"c": 1, "d": 2}
    await queue.end("b")
    assert queue.go() == ["a", "c"]
    assert queue.positions() == {"d": 1}
    await queue.leave()


async def test_a_turn_that_is_given_back_twice_makes_room_for_one() -> None:
    queue = Queue(1)
    await queue.ask("a", "b", "c")
    turn = queue.asking["a"].result()
    queue.turns.give_back(turn)
    queue.turns.give_back(turn)
    await queue.settled()
    assert queue.go() == ["a", "b"]
    await queue.leave()


async def test_one_that_is_taken_back_leaves_the_queue() -> None:
    queue = Queue(1)
    await queue.ask("a", "b", "c")
    queue.asking.pop("b").cancel()
    await queue.settled()
    assert queue.positions() == {"c": 1}
    await queue.end("a")
    assert queue.go() == ["c"]
    await queue.leave()


async def test_a_migration_that_is_under_way_already_counts() -> None:
    queue = Queue(1)
    turn = queue.turns.occupy(record("old"))
    await queue.ask("a")
    assert queue.go() == []
    queue.turns.give_back(turn)
    await queue.settled()
    assert queue.go() == ["a"]
    await queue.leave()


async def refused(queue: Queue, name: str) -> asyncio.Task[None]:
    """The destination has no room for one that has a turn: it asks for another one."""
    again = asyncio.create_task(queue.turns.again(queue.asking[name].result()))
    await queue.settled()
    return again


async def test_only_those_to_a_full_destination_wait_behind_the_one_that_asks_it_again() -> None:
    queue = Queue(2)
    await queue.ask("a")
    await queue.ask("b", destination="full:1")
    again = await refused(queue, "b")
    await queue.ask("c", destination="full:1")
    await queue.ask("d")
    assert queue.go() == ["a", "b", "d"]
    assert not again.done()
    assert queue.positions() == {"b": 1, "c": 2}
    await queue.end("a")
    assert not queue.asking["c"].done()
    async with asyncio.timeout(10):
        await again
    assert queue.positions() == {"c": 1}
    # It is asked by one at a time, until it has room.
    assert not queue.asking["c"].done()
    await queue.end("d")
    assert not queue.asking["c"].done()
    queue.turns.accepted(queue.asking["b"].result())
    await queue.settled()
    assert queue.asking["c"].done()
    await queue.leave()


async def test_one_that_was_refused_keeps_its_place() -> None:
    queue = Queue(1)
    await queue.ask("a", "b")
    again = await refused(queue, "a")
    assert queue.positions() == {"a": 1, "b": 2}
    async with asyncio.timeout(10):
        await again
    assert queue.positions() == {"b": 1}
    await queue.leave()


async def test_a_timer_that_comes_a_moment_early_has_the_destination_asked_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    call_later = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda delay, *rest: call_later(max(0.0, delay - 0.02), *rest))
    queue = Queue(1)
    await queue.ask("a")
    async with asyncio.timeout(5):
        await queue.turns.again(queue.asking["a"].result())
    await queue.leave()


async def test_one_that_ends_while_it_asks_lets_the_next_ask() -> None:
    queue = Queue(1)
    await queue.ask("a", "b")
    again = await refused(queue, "a")
    async with asyncio.timeout(10):
        await again
    await queue.end("a")
    async with asyncio.timeout(10):
        await queue.asking["b"]
    await queue.leave()


async def test_changes_of_place_are_told() -> None:
    queue = Queue(1)
    await queue.ask("a", "b", "c")
    waiting = asyncio.create_task(queue.records["c"].changes.wait(10))
    await queue.settled()
    await queue.end("a")
    await asyncio.wait_for(waiting, 5)
    assert queue.positions() == {"c": 1}
    await queue.leave()


@pytest.mark.parametrize("most", [1, 3])
async def test_nobody_is_forgotten(most: int) -> None:
    queue = Queue(most)
    names = [str(number) for number in range(20)]
    await queue.ask(*names)
    went = []
    while queue.asking:
        name = queue.go()[0]
        went.append(name)
        await queue.end(name)
    assert went == names
