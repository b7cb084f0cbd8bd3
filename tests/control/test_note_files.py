"""Notes that outlive the process: whole or not there, and read only as they were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import FerryError, Reason
from pageferryd.control.note_files import MAX_BYTES, NoteFiles, UnreadableNoteError

CONTENT = {"pid": 4711, "name": "web"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal.d"


@pytest.fixture
def notes(directory: Path) -> NoteFiles:
    return NoteFiles(directory)


def test_a_note_is_read_as_it_was_written(directory: Path, notes: NoteFiles) -> None:
    notes.write("m.ready", CONTENT)
    assert NoteFiles(directory).read("m.ready") == {"version": 1, **CONTENT}


def test_a_note_takes_the_place_of_an_earlier_one(notes: NoteFiles) -> None:
    notes.write("m.ready", CONTENT)
    notes.write("m.ready", {"pid": 1})
    assert notes.read("m.ready")["pid"] == 1


def test_a_note_can_be_renamed_and_removed(directory: Path, notes: NoteFiles) -> None:
    notes.write("m.ready", CONTENT)
    notes.rename("m.ready", "m.owned")
    assert not notes.has("m.ready")
    assert notes.read("m.owned")["pid"] == 4711
    notes.remove("m.owned", "m.never")
    assert not directory.exists()


def changed(text: bytes) -> bytes:
    return text.replace(b"4711", b"4712")


def torn(text: bytes) -> bytes:
    return text[: len(text) // 2]


def of_another_version(text: bytes) -> bytes:
    entry = json.dumps({**json.loads(text.splitlines()[0]), "version": 2}).encode()
    return entry + b"\n" + sha256(entry).hexdigest().encode()


@pytest.mark.parametrize("spoil", [changed, torn, of_another_version, lambda _text: b"", lambda _text: b"\xff\n"])
def test_a_note_that_is_not_what_was_written_cannot_be_read(
    directory: Path, notes: NoteFiles, spoil: Callable[[bytes], bytes]
) -> None:
    notes.write("m.owned", CONTENT)
    path = directory / "m.owned"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UnreadableNoteError):
        notes.read("m.owned")


@given(st.binary(max_size=400))
def test_no_content_of_a_file_is_more_than_unreadable(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("notes")
    (directory / "m.owned").write_bytes(content)
    with pytest.raises(UnreadableNoteError):
        NoteFiles(directory).read("m.owned")


def test_what_was_being_written_at_the_end_of_a_process_is_swept_away(directory: Path, notes: NoteFiles) -> None:
    notes.write("m.owned", CONTENT)
    (directory / "m.ready.writing").write_bytes(b"half a no")
    notes.sweep()
    assert [path.name for path in directory.iterdir()] == ["m.owned"]


def test_sweeping_where_nothing_was_written_makes_nothing(directory: Path, notes: NoteFiles) -> None:
    notes.sweep()
    assert not directory.exists()


def test_a_note_that_cannot_be_written_leaves_the_earlier_one(directory: Path, notes: NoteFiles) -> None:
    notes.write("m.owned", CONTENT)
    with pytest.raises(FerryError) as refused:
        notes.write("m.owned", {"much": "x" * MAX_BYTES})
    assert refused.value.reason is Reason.NO_SPACE
    assert notes.read("m.owned")["pid"] == 4711
    assert [path.name for path in directory.iterdir()] == ["m.owned"]


def test_notes_in_the_place_of_a_file_are_refused(directory: Path, notes: NoteFiles) -> None:
    directory.write_text("a file is in the way")
    with pytest.raises(FerryError, match="make room there") as refused:
        notes.write("m.owned", CONTENT)
    assert refused.value.reason is Reason.NO_SPACE
