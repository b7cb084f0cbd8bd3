"""What a source is told of a guest that ended under an earlier sidecar of its destination."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, memory_pb2, migration_pb2
from pageferryd.config import Settings
from pageferryd.control.arrivals_journal import Arriving
from pageferryd.control.book import MigrationBook
from pageferryd.control.drain import Drain
from pageferryd.control.incoming_service import IncomingServicer
from pageferryd.control.journal import Journal
from pageferryd.control.registry import GuestRegistry
from pageferryd.control.surroundings import Surroundings
from pageferryd.control.templates import VmmStarter

LAYOUT = memory_pb2.MemoryLayout(regions=[memory_pb2.MemoryRegion(size=1 << 20, page_size=4096)])


def caller(*names: str) -> Any:
    """The context of a call by somebody who has proved these names."""
    proved = {"peer_dns": [name.encode() for name in names]} if names else {}
    return SimpleNamespace(auth_context=lambda: proved)


ANYBODY = caller()


class Host:
    """A destination whose sidecar has just started; `journal` is what an earlier one has left."""

    def __init__(self, directory: Path) -> None:
        settings = Settings(host="b", listen=["127.0.0.1:0"], insecure=True, runtime_dir=directory)
        guests = GuestRegistry({})
        self.notes = directory / "journal.d"
        self.journal = Journal(self.notes)
        around = Surroundings(settings, None, guests, self.journal)
        starter = VmmStarter([], guests, directory, 8)
        self.service = IncomingServicer(MigrationBook(8, lambda _id: None), around, Drain(), starter)

    def left(self, step: str) -> None:
        prepare = incoming_pb2.PrepareRequest(migration_id="m", guest_id="g", source_name="a")
        self.journal.arrivals.ready(Arriving("/v", 1, 1, prepare, LAYOUT, []))
        if step == "never":
            self.journal.arrivals.never_ran("m")
        else:
            self.journal.arrivals.owns("m")
            if step == "lost":
                self.journal.arrivals.lost("m")

    async def commit(self, who: Any = ANYBODY, migration_id: str = "m") -> Reason:
        with pytest.raises(FerryError) as told:
            await self.service.Commit(incoming_pb2.CommitRequest(migration_id=migration_id), who)
        return told.value.reason

    async def view(self, who: Any = ANYBODY) -> migration_pb2.HandoverView:
        asked = incoming_pb2.DescribeHandoverRequest(migration_id="m")
        return (await self.service.DescribeHandover(asked, who)).view


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    # A path of a test's own name would be too long for sockets.
    return Host(tmp_path_factory.mktemp("h"))


async def test_a_guest_that_never_ran_is_its_sources(host: Host) -> None:
    host.left("never")
    assert await host.commit() is Reason.NEVER_RAN
    view = await host.view()
    assert (view.reachable, view.known, view.handed_over) == (True, True, False)
    assert view.state == migration_pb2.MIGRATION_STATE_FAILED


async def test_a_source_that_says_that_it_knows_has_it_forgotten(host: Host) -> None:
    host.left("never")
    await host.service.Abort(incoming_pb2.AbortRequest(migration_id="m"), ANYBODY)
    assert not host.notes.exists()
    assert await host.commit() is Reason.UNKNOWN_MIGRATION


async def test_a_guest_that_was_lost_is_told_of_as_that(host: Host) -> None:
    host.left("lost")
    assert await host.commit() is Reason.GIVEN_UP
    view = await host.view()
    assert (view.known, view.handed_over, view.state) == (True, False, migration_pb2.MIGRATION_STATE_FAILED)


async def test_a_note_that_nobody_can_read_is_no_word_that_the_guest_never_ran(host: Host) -> None:
    host.left("owned")
    note = host.notes / "m.owned"
    note.write_bytes(note.read_bytes()[:-80])
    assert await host.commit() is Reason.JOURNAL_UNREADABLE
    view = await host.view()
    assert (view.known, view.handed_over) == (True, True)
    assert "cannot be read" in view.detail


async def test_a_guest_that_nobody_knows_is_unknown(host: Host) -> None:
    assert await host.commit() is Reason.UNKNOWN_MIGRATION
    view = await host.view()
    assert (view.reachable, view.known) == (True, False)


@pytest.mark.parametrize("migration_id", ["../m", "m/../m", "", "m" * 33, "m.never"])
async def test_no_id_leads_out_of_the_notes(host: Host, migration_id: str) -> None:
    host.left("never")
    assert await host.commit(migration_id=migration_id) is Reason.UNKNOWN_MIGRATION
    with pytest.raises(FerryError) as told:
        await host.service.Abort(incoming_pb2.AbortRequest(migration_id=migration_id), ANYBODY)
    assert told.value.reason is Reason.UNKNOWN_MIGRATION
    assert (host.notes / "m.never").exists()


@pytest.mark.parametrize("step", ["never", "lost"])
async def test_only_its_source_is_told(host: Host, step: str) -> None:
    host.left(step)
    stranger = caller("c")
    assert await host.commit(stranger) is Reason.PEER_NOT_ALLOWED
    with pytest.raises(FerryError) as refused:
        await host.view(stranger)
    assert refused.value.reason is Reason.PEER_NOT_ALLOWED
    assert await host.commit(caller("a")) in (Reason.NEVER_RAN, Reason.GIVEN_UP)
