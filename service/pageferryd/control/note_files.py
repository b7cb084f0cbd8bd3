"""Small files that outlive the process: each written whole and synced, and read only when it is what was written.

A file is one line of JSON and one of its SHA-256. It appears under its name at once, or not at all; renaming it needs
no room, and is synced as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pageferry.errors import FerryError, Reason

VERSION = 1
MAX_BYTES = 64 << 20
_UNFINISHED = ".writing"


class UnreadableNoteError(Exception):
    """A note is not what was written, or of another release. `str()` says why."""


class NoteFiles:
    """The notes of one directory, by name. Errors in writing are FerryError(NO_SPACE)."""

    def __init__(self, directory: Path) -> None:
        """Touch nothing yet; the directory is made when something is written."""
        self.directory = directory

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a note, in place of one of that name, if there is one."""
        text = json.dumps({"version": VERSION, **content}).encode()
        whole = text + b"\n" + _digest(text)
        if len(whole) > MAX_BYTES:
            raise FerryError(Reason.NO_SPACE, f"the note {name} would have {len(whole)} bytes; {MAX_BYTES} are allowed")
        unfinished = self.directory / (name + _UNFINISHED)
        try:
            self.make()
            _write_synced(unfinished, whole)
            unfinished.rename(self.directory / name)
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise self.unwritable(name, error) from error

    def rename(self, old: str, new: str) -> None:
        """Let a note mean something else from now on."""
        try:
            (self.directory / old).rename(self.directory / new)
            self._sync()
        except OSError as error:
            raise self.unwritable(new, error) from error

    def remove(self, *names: str) -> None:
        """Forget notes; those that are not there as well. An empty directory goes with the last."""
        for name in names:
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def has(self, name: str) -> bool:
        """Say whether there is such a note, readable or not."""
        return (self.directory / name).exists()

    def stems(self, suffix: str) -> list[str]:
        """Return the names without their suffix of all notes that have it, oldest first."""
        found: list[tuple[float, str]] = []
        for path in self.directory.glob(f"*{suffix}"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.name.removesuffix(suffix)))
        return [stem for _, stem in sorted(found)]

    def read(self, name: str) -> dict[str, Any]:
        """Return what was written. UnreadableNoteError where that is not to be had."""
        try:
            with (self.directory / name).open("rb") as file:
                text, _, digest = file.read(MAX_BYTES + 1).rpartition(b"\n")
            if digest != _digest(text):
                raise UnreadableNoteError("it is torn or was changed")
            content = json.loads(text)
            version = content["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableNoteError(f"{type(error).__name__}: {error}") from error
        if version != VERSION:
            raise UnreadableNoteError(f"it is of version {version}, and this release knows {VERSION}")
        return dict(content)

    def sweep(self) -> None:
        """Remove what was being written when an earlier process ended: no step was taken on the strength of it."""
        self.remove(*(path.name for path in self.directory.glob(f"*{_UNFINISHED}")))

    def make(self) -> None:
        """Make the directory."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def unwritable(self, name: str, error: OSError) -> FerryError:
        """Return what a failure to write means."""
        return FerryError(
            Reason.NO_SPACE, f"{name} cannot be noted in {self.directory}: {error.strerror}; make room there"
        )

    def _sync(self) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _write_synced(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
