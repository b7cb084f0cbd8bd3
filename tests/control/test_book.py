"""The book of migrations: the newest of those that ended are kept, all that go on, and every figure."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.config import Limits
from pageferryd.control.book import MAX_ENDED, MigrationBook
from pageferryd.control.departure import Departure
from pageferryd.control.following import Following
from pageferryd.control.incoming import Incoming
from pageferryd.control.outgoing import Outgoing
from pageferryd.control.record import MigrationRecord
from pageferryd.core.figures import Figures
from pageferryd.core.lifecycle import State


def record_of(name: str, role: Any = migration_pb2.ROLE_SOURCE, request: str = "") -> MigrationRecord:
    return MigrationRecord(name, request or f"r-{name}", "g", role, "a", "b", "b:1", migration_pb2.Limits())


def outgoing(name: str, request: str = "", served: int = 0) -> Outgoing:
    """An outgoing migration that does nothing."""
    one = Outgoing.__new__(Outgoing)
    one.record = record_of(name, request=request)
    one._following = Following(one.record, asyncio.Event(), Limits())
    one._departure = Departure.__new__(Departure)
    one._departure.served = Served(served) if served else None  # type: ignore[assignment]
    return one


class Served:
    def __init__(self, pages: int) -> None:
        self.pages = {("push", "raw"): pages}
        self.bytes = {"push": 4096 * pages}


async def incoming(name: str) -> Incoming:
    around = SimpleNamespace(settings=SimpleNamespace(limits=Limits()))
    one = Incoming(record_of(name, migration_pb2.ROLE_DESTINATION), None, around)  # type: ignore[arg-type]
    one.final_figures = Figures(duplicate_pages=1)
    return one


@pytest.fixture
def evicted() -> list[str]:
    return []


@pytest.fixture
def book(evicted: list[str]) -> MigrationBook:
    return MigrationBook(3, evicted.append)


def end(mover: Outgoing | Incoming) -> None:
    mover.record.fail(FerryError(Reason.NO_SPACE, "no room"))


def test_what_was_added_is_found_and_nothing_else(book: MigrationBook) -> None:
    one = outgoing("m")
    book.add(one)
    assert book.get("m") is one
    assert book.knows("m")
    assert not book.knows("n")
    with pytest.raises(FerryError) as unknown:
        book.get("n")
    assert unknown.value.reason is Reason.UNKNOWN_MIGRATION


async def test_only_what_comes_here_is_incoming(book: MigrationBook) -> None:
    book.add(outgoing("out"))
    coming = await incoming("in")
    book.add(coming)
    assert book.incoming("in") is coming
    with pytest.raises(FerryError) as refused:
        book.incoming("out")
    assert refused.value.reason is Reason.UNKNOWN_MIGRATION


async def test_a_request_finds_what_it_began(book: MigrationBook) -> None:
    one = outgoing("m", "request")
    book.add(one)
    book.add(await incoming("n"))
    assert book.by_request("request") is one
    assert book.by_request("other") is None
    # Migrations that come here have no request of this host's.
    assert book.by_request("r-n") is None


def test_no_more_go_on_at_once_than_may_and_those_that_ended_do_not_count(book: MigrationBook) -> None:
    movers = [outgoing(name) for name in "abc"]
    for mover in movers:
        book.check_room()
        book.add(mover)
    with pytest.raises(FerryError) as full:
        book.check_room()
    assert full.value.reason is Reason.TOO_MANY_MIGRATIONS
    end(movers[1])
    book.check_room()
    assert [mover.record.migration_id for mover in book.active()] == ["a", "c"]


def test_the_newest_that_ended_are_kept_and_those_that_go_on_always(book: MigrationBook, evicted: list[str]) -> None:
    going = outgoing("going")
    book.add(going)
    for number in range(MAX_ENDED + 5):
        mover = outgoing(f"m{number}")
        book.add(mover)
        end(mover)
    book.add(outgoing("last"))
    assert evicted == [f"m{number}" for number in range(5)]
    assert book.get("going") is going
    assert not book.knows("m4")
    assert book.knows("m5")
    names = [mover.record.migration_id for mover in book.newest_first()]
    assert names[:2] == ["last", f"m{MAX_ENDED + 4}"]
    assert len(names) == MAX_ENDED + 2


async def test_figures_never_shrink_when_migrations_are_forgotten(book: MigrationBook) -> None:
    coming = await incoming("in")
    book.add(coming)
    end(coming)
    for number in range(MAX_ENDED + 20):
        mover = outgoing(f"m{number}", served=2)
        book.add(mover)
        if number % 40 == 0:
            assert book.figures().served_bytes["push"] == 2 * 4096 * (number + 1)
        end(mover)
    figures = book.figures()
    assert figures.duplicate_pages == 1
    assert figures.served_pages["push", "raw"] == 2 * (MAX_ENDED + 20)


async def test_gauges_count_by_role_and_state_and_show_the_last_that_ended(book: MigrationBook) -> None:
    first, second = outgoing("a"), outgoing("b")
    for mover in (first, second, await incoming("c")):
        book.add(mover)
    assert book.gauges().last_pages is None
    first.record.downtime = 0.25
    end(first)
    gauges = book.gauges()
    assert gauges.migrations == {("source", "failed"): 1, ("source", "pending"): 1, ("destination", "pending"): 1}
    assert gauges.last_downtime_seconds == 0.25

    second.record.lifecycle.to(State.CANCELLED)
    assert first.record.ended is not None
    second.record.ended = first.record.ended + 1
    assert book.gauges().last_downtime_seconds is None
