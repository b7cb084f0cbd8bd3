"""What a source notes of guests that leave, and what a later sidecar reads of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2, migration_pb2
from pageferryd.control.departures_journal import DeparturesJournal, Leaving, LeftMemory, Step
from pageferryd.control.note_files import NoteFiles

MEMORY = LeftMemory(
    memory_pb2.MemoryLayout(regions=[memory_pb2.MemoryRegion(size=1 << 20, page_size=4096)]),
    [memory_pb2.MemoryLocation(memfd=memory_pb2.MemfdMemory(fd=7, offset=4096))],
    4711,
    12345,
    [(0, 8192), (1 << 40, 4096)],
    opaque=True,
    files=["region0"],
)
ONE = Leaving(
    migration_pb2.Migration(
        migration_id="m",
        request_id="r",
        guest_id="web",
        destination_name="b",
        destination_address="b:1",
        limits=migration_pb2.Limits(push_weight=7),
        policy=migration_pb2.Policy(checksums=True),
    ),
    "qemu",
    "/run/vm.sock",
    4711,
    12345,
    bytes(range(32)),
)
WHOLE = replace(ONE, memory=MEMORY)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(directory: Path) -> DeparturesJournal:
    return DeparturesJournal(NoteFiles(directory))


def read(directory: Path) -> list[tuple[Leaving, Step]]:
    return list(DeparturesJournal(NoteFiles(directory)).unfinished())


def test_a_guest_that_leaves_is_known_again_with_its_memory_once_that_was_noted(
    directory: Path, journal: DeparturesJournal
) -> None:
    journal.leaves(ONE)
    assert read(directory) == [(ONE, Step.LEAVING)]
    journal.leaves(WHOLE)
    assert read(directory) == [(WHOLE, Step.LEAVING)]


def test_each_step_is_known_again(directory: Path, journal: DeparturesJournal) -> None:
    journal.leaves(WHOLE)
    journal.given("m")
    assert read(directory) == [(WHOLE, Step.GIVEN)]
    journal.arrived("m")
    assert read(directory) == [(WHOLE, Step.ARRIVED)]
    journal.ended("m")
    journal.ended("m")
    assert not directory.exists()


def test_a_guest_that_was_taken_back_is_this_hosts_again(directory: Path, journal: DeparturesJournal) -> None:
    journal.leaves(WHOLE)
    journal.given("m")
    journal.taken_back("m")
    journal.taken_back("m")
    assert read(directory) == [(WHOLE, Step.LEAVING)]


def test_a_guest_that_was_not_given_away_does_not_arrive(directory: Path, journal: DeparturesJournal) -> None:
    journal.leaves(WHOLE)
    journal.arrived("m")
    assert read(directory) == [(WHOLE, Step.LEAVING)]


def test_giving_a_guest_away_needs_the_note_that_it_leaves(journal: DeparturesJournal) -> None:
    with pytest.raises(FerryError) as refused:
        journal.given("m")
    assert refused.value.reason is Reason.NO_SPACE


def test_the_secret_is_for_nobody_else_and_in_no_log(directory: Path, journal: DeparturesJournal) -> None:
    journal.leaves(ONE)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert ONE.token.hex() not in repr(ONE)
    assert repr(ONE.token) not in repr(ONE)


def test_a_note_that_cannot_be_read_stays_and_is_told_of(
    directory: Path, journal: DeparturesJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.leaves(WHOLE)
    journal.given("m")
    path = directory / "m.given"
    path.write_bytes(path.read_bytes().replace(b"4711", b"4712"))
    assert read(directory) == []
    assert path.exists()
    assert "journal_unreadable" in capsys.readouterr().out


def test_a_note_without_what_belongs_into_it_cannot_be_read(directory: Path) -> None:
    NoteFiles(directory).write("m.given", {"pid": 1})
    assert read(directory) == []
