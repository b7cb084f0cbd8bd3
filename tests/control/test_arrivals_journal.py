"""What a sidecar notes of guests that are its own, and what a later one reads of that."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, memory_pb2, migration_pb2
from pageferryd.control.journal import Arriving, Journal

LAYOUT = memory_pb2.MemoryLayout(regions=[memory_pb2.MemoryRegion(size=1 << 20, page_size=4096)])
ONE = Arriving(
    "/run/vm.sock",
    4711,
    incoming_pb2.PrepareRequest(
        migration_id="m",
        guest_id="web",
        layout=LAYOUT,
        token=bytes(range(32)),
        limits=migration_pb2.Limits(push_bytes_per_second=1 << 40),
        driver="qemu",
    ),
    LAYOUT,
    [1 << 46],
)


def owned(journal: Journal) -> None:
    journal.ready(ONE)
    journal.owns("m")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(directory: Path) -> Journal:
    return Journal(directory)


def test_what_was_noted_is_read_by_the_next(directory: Path, journal: Journal) -> None:
    owned(journal)
    journal.close()
    assert list(Journal(directory).unfinished()) == [ONE]


def test_nothing_is_read_where_nothing_was_noted(journal: Journal) -> None:
    assert list(journal.unfinished()) == []
    assert journal.discards("m") == []


def test_the_secret_in_it_is_for_nobody_else(directory: Path, journal: Journal) -> None:
    owned(journal)
    journal.discarded("m", 0, 1)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_a_migration_that_has_ended_leaves_nothing(directory: Path, journal: Journal) -> None:
    owned(journal)
    journal.discarded("m", 0, 1)
    journal.ended("m")
    journal.ended("m")
    assert not directory.exists()


def test_another_migration_is_left_alone_by_that(journal: Journal) -> None:
    owned(journal)
    journal.ended("other")
    assert list(journal.unfinished()) == [ONE]


def test_discards_are_known_again_in_their_order_without_one_that_is_torn(directory: Path, journal: Journal) -> None:
    journal.discarded("m", 7, 1)
    journal.discarded("m", 1 << 39, 512)
    journal.close()
    with (directory / "m.discards").open("ab") as notes:
        notes.write(b"torn")
    assert Journal(directory).discards("m") == [(7, 1), (1 << 39, 512)]


def changed(text: bytes) -> bytes:
    return text.replace(b"4711", b"4712")


def torn(text: bytes) -> bytes:
    return text[: len(text) // 2]


def of_another_version(text: bytes) -> bytes:
    entry = json.dumps({**json.loads(text.splitlines()[0]), "version": 2}).encode()
    return entry + b"\n" + sha256(entry).hexdigest().encode()


@pytest.mark.parametrize("spoil", [changed, torn, of_another_version, lambda _text: b"", lambda _text: b"\xff\n"])
def test_an_entry_that_is_not_whole_is_never_guessed_at_and_kept(
    directory: Path, journal: Journal, spoil: object, capsys: pytest.CaptureFixture[str]
) -> None:
    owned(journal)
    path = directory / "m.json"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    assert list(journal.unfinished()) == []
    assert path.exists()
    assert "journal_unreadable" in capsys.readouterr().out


def test_a_guest_that_was_only_readied_for_is_told_apart(directory: Path, journal: Journal) -> None:
    journal.ready(ONE)
    assert list(journal.unfinished()) == []
    assert list(journal.never_owned()) == [ONE]
    journal.ended("m")
    assert not directory.exists()


def test_becoming_the_owner_needs_what_was_readied(journal: Journal) -> None:
    with pytest.raises(FerryError) as refused:
        journal.owns("m")
    assert refused.value.reason is Reason.NO_SPACE


def test_what_cannot_be_noted_is_an_error(directory: Path, journal: Journal) -> None:
    directory.write_text("a file is in the way")
    for call in (lambda: journal.ready(ONE), lambda: journal.discarded("m", 0, 1)):
        with pytest.raises(FerryError) as refused:
            call()
        assert refused.value.reason is Reason.NO_SPACE
