"""What a destination notes of guests that come, and what a later sidecar reads of that."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, memory_pb2, migration_pb2
from pageferryd.control.arrivals_journal import MAX_REMEMBERED, ArrivalsJournal, Arriving
from pageferryd.control.note_files import NoteFiles
from pageferryd.linux.proc import started_at

LAYOUT = memory_pb2.MemoryLayout(regions=[memory_pb2.MemoryRegion(size=1 << 20, page_size=4096)])


def arriving(migration_id: str = "m") -> Arriving:
    prepare = incoming_pb2.PrepareRequest(
        migration_id=migration_id,
        guest_id="web",
        layout=LAYOUT,
        source_name="a",
        token=bytes(range(32)),
        limits=migration_pb2.Limits(push_bytes_per_second=1 << 40),
        policy=migration_pb2.Policy(on_loss=migration_pb2.ON_LOSS_KILL, checksums=True),
        driver="qemu",
    )
    kept = {"uffd": (12, 1 << 40), "memory": (0, 7)}
    return Arriving("/run/vm.sock", 4711, 12345, prepare, LAYOUT, [1 << 46], kept, bytes(range(32)))


ONE = arriving()


def owned(journal: ArrivalsJournal) -> None:
    journal.ready(ONE)
    journal.owns("m")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(directory: Path) -> ArrivalsJournal:
    return ArrivalsJournal(NoteFiles(directory))


def next_sidecars(directory: Path) -> ArrivalsJournal:
    return ArrivalsJournal(NoteFiles(directory))


def test_what_was_noted_is_read_by_the_next(directory: Path, journal: ArrivalsJournal) -> None:
    owned(journal)
    journal.close()
    assert list(next_sidecars(directory).owned()) == [ONE]


def test_nothing_is_read_where_nothing_was_noted(journal: ArrivalsJournal) -> None:
    assert list(journal.owned()) == list(journal.readied()) == list(journal.never_ran_here()) == []
    assert journal.discards("m") == []
    assert not journal.unreadable("m")


def test_the_secret_in_it_is_for_nobody_else(directory: Path, journal: ArrivalsJournal) -> None:
    owned(journal)
    journal.discarded("m", 0, 1)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_a_guest_that_is_whole_leaves_nothing(directory: Path, journal: ArrivalsJournal) -> None:
    owned(journal)
    journal.discarded("m", 0, 1)
    journal.completed("m")
    journal.completed("m")
    assert not directory.exists()


def test_another_migration_is_left_alone_by_that(journal: ArrivalsJournal) -> None:
    owned(journal)
    journal.completed("other")
    assert list(journal.owned()) == [ONE]


def test_discards_are_known_again_in_their_order_without_one_that_is_torn(
    directory: Path, journal: ArrivalsJournal
) -> None:
    journal.discarded("m", 7, 1)
    journal.discarded("m", 1 << 39, 512)
    journal.close()
    with (directory / "m.discards").open("ab") as notes:
        notes.write(b"torn")
    later = next_sidecars(directory)
    assert later.discards("m") == [(7, 1), (1 << 39, 512)]
    later.discarded("m", 9, 2)
    assert later.discards("m") == [(7, 1), (1 << 39, 512), (9, 2)]
    later.close()


def test_a_discard_that_is_not_written_whole_is_an_error_and_leaves_nothing(
    journal: ArrivalsJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.discarded("m", 7, 1)
    write = os.write
    monkeypatch.setattr("os.write", lambda fd, data: write(fd, data[:5]))
    with pytest.raises(FerryError) as refused:
        journal.discarded("m", 8, 1)
    monkeypatch.undo()
    assert refused.value.reason is Reason.NO_SPACE
    journal.discarded("m", 9, 1)
    assert journal.discards("m") == [(7, 1), (9, 1)]
    journal.close()


def test_a_guest_that_was_only_readied_for_is_told_apart(journal: ArrivalsJournal) -> None:
    journal.ready(ONE)
    assert list(journal.owned()) == []
    assert list(journal.readied()) == [ONE]


def test_a_guest_that_never_ran_here_is_remembered_for_its_source_until_that_knows(
    directory: Path, journal: ArrivalsJournal
) -> None:
    journal.ready(ONE)
    journal.never_ran("m")
    journal.never_ran("m")
    later = next_sidecars(directory)
    assert later.ended_before("m") == ONE.prepare
    assert list(later.never_ran_here()) == [ONE]
    assert list(later.readied()) == []
    later.completed("m")
    assert later.ended_before("m") is None
    assert not directory.exists()


def test_a_guest_that_was_lost_is_remembered_without_its_discards(directory: Path, journal: ArrivalsJournal) -> None:
    owned(journal)
    journal.discarded("m", 0, 1)
    journal.lost("m")
    assert journal.was_lost("m") == ONE.prepare
    assert journal.ended_before("m") is None
    assert [path.name for path in directory.iterdir()] == ["m.lost"]


def test_a_guest_that_is_whole_is_told_apart_until_its_source_knows(directory: Path, journal: ArrivalsJournal) -> None:
    owned(journal)
    journal.whole("m")
    journal.whole("m")
    assert list(next_sidecars(directory).owned()) == [replace(ONE, whole=True)]
    journal.lost("m")
    assert journal.was_lost("m") == ONE.prepare


def test_what_was_never_noted_is_not_remembered_as_ended(directory: Path, journal: ArrivalsJournal) -> None:
    journal.never_ran("m")
    journal.lost("m")
    assert not directory.exists()


def test_the_newest_that_ended_are_remembered(directory: Path, journal: ArrivalsJournal) -> None:
    for number in range(MAX_REMEMBERED + 3):
        journal.ready(arriving(f"m{number}"))
        os.utime(directory / f"m{number}.ready", (number, number))
        journal.never_ran(f"m{number}")
    assert journal.ended_before("m2") is None
    assert journal.ended_before("m3") is not None
    assert len(list(directory.iterdir())) == MAX_REMEMBERED


@pytest.mark.parametrize("suffix", [".owned", ".whole", ".ready", ".never", ".lost"])
def test_a_note_that_cannot_be_read_stays_and_is_never_guessed_at(
    directory: Path, journal: ArrivalsJournal, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    owned(journal)
    path = directory / f"m{suffix}"
    (directory / "m.owned").rename(path)
    path.write_bytes(path.read_bytes()[:-70])
    assert journal.unreadable("m")
    assert [*journal.owned(), *journal.readied(), *journal.never_ran_here()] == []
    assert journal.ended_before("m") is None
    assert journal.was_lost("m") is None
    assert path.exists()
    if suffix != ".lost":
        assert "journal_unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"address": "x"}, {"pid": "many"}])
def test_a_note_without_what_belongs_into_it_cannot_be_read(
    directory: Path, journal: ArrivalsJournal, content: dict[str, object]
) -> None:
    NoteFiles(directory).write("m.owned", content)
    assert journal.unreadable("m")
    assert list(journal.owned()) == []


def test_becoming_the_owner_needs_what_was_readied(journal: ArrivalsJournal) -> None:
    with pytest.raises(FerryError) as refused:
        journal.owns("m")
    assert refused.value.reason is Reason.NO_SPACE


def test_what_cannot_be_noted_is_an_error(directory: Path, journal: ArrivalsJournal) -> None:
    directory.write_text("a file is in the way")
    for call in (lambda: journal.ready(ONE), lambda: journal.discarded("m", 0, 1)):
        with pytest.raises(FerryError) as refused:
            call()
        assert refused.value.reason is Reason.NO_SPACE


def test_a_vmm_is_told_from_a_later_process_with_its_id() -> None:
    me = Arriving("", os.getpid(), started_at(os.getpid()), ONE.prepare, LAYOUT, [])
    assert me.alive
    assert not Arriving("", os.getpid(), me.started + 1, ONE.prepare, LAYOUT, []).alive
