"""What a sidecar must know again after it was killed: the guests whose memory it was filling.

One file a migration, in the runtime directory: like the VMMs that it is about, it outlives the sidecar but no restart
of the host. It is written and synced as NAME.new before the guest stops at its source, with a digest, and renamed to
NAME.json when the guest becomes this host's: so that step needs no room, and is done or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2, memory_pb2

_log = structlog.get_logger(__name__)

VERSION = 1
_MAX_ENTRY_BYTES = 4 << 20
_DISCARD = struct.Struct("<QQ")
_MAX_DISCARDS = 1 << 22


@dataclass(frozen=True)
class Arriving:
    """A guest that is this host's, and whose memory is not whole yet.

    `address` is its VMM's, `prepare` what the source announced, `layout` the memory as it is filled here, and
    `addresses` are where its regions lie in the VMM: empty where no userfaultfd guards them.
    """

    address: str
    pid: int
    prepare: incoming_pb2.PrepareRequest
    layout: memory_pb2.MemoryLayout
    addresses: Sequence[int]


class Journal:
    """The files of one sidecar."""

    def __init__(self, directory: Path) -> None:
        """Touch nothing yet; the directory is made when something is written."""
        self._directory = directory
        self._discards: dict[str, int] = {}

    def ready(self, arriving: Arriving) -> None:
        """Note a guest that is to become this host's, so that `owns` needs no room. FerryError(NO_SPACE)."""
        content = {
            "version": VERSION,
            "address": arriving.address,
            "pid": arriving.pid,
            "prepare": json_format.MessageToDict(arriving.prepare),
            "layout": json_format.MessageToDict(arriving.layout),
            "addresses": list(arriving.addresses),
        }
        text = json.dumps(content).encode()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._readied(arriving.prepare.migration_id), text + b"\n" + _digest(text))
        except OSError as error:
            raise _unwritable(arriving.prepare.migration_id, self._directory, error) from error

    def owns(self, migration_id: str) -> None:
        """Note, durably, that the guest is this host's from now on. FerryError(NO_SPACE) where that cannot be."""
        try:
            self._readied(migration_id).rename(self._entry(migration_id))
            _sync_directory(self._directory)
        except OSError as error:
            raise _unwritable(migration_id, self._directory, error) from error

    def discarded(self, migration_id: str, first: int, pages: int) -> None:
        """Note that the guest gave pages away: what the source has of them is stale. FerryError(NO_SPACE)."""
        try:
            fd = self._discards.get(migration_id)
            if fd is None:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(self._notes(migration_id), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._discards[migration_id] = fd
            os.write(fd, _DISCARD.pack(first, pages))
        except OSError as error:
            raise _unwritable(migration_id, self._directory, error) from error

    def ended(self, migration_id: str) -> None:
        """Forget a migration whose guest needs the sidecar no longer."""
        fd = self._discards.pop(migration_id, None)
        if fd is not None:
            os.close(fd)
        for path in (self._readied(migration_id), self._entry(migration_id), self._notes(migration_id)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def close(self) -> None:
        """Let files go; what they say stays."""
        while self._discards:
            os.close(self._discards.popitem()[1])

    def unfinished(self) -> Iterator[Arriving]:
        """Yield the guests that an earlier sidecar owned; files that cannot be read stay, and are logged."""
        return self._entries("*.json")

    def never_owned(self) -> Iterator[Arriving]:
        """Yield the guests that an earlier sidecar was ready for, and that never ran here."""
        return self._entries("*.new")

    def _entries(self, pattern: str) -> Iterator[Arriving]:
        for path in sorted(self._directory.glob(pattern)):
            try:
                yield _read(path)
            except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
                _log.error("journal_unreadable", file=str(path), detail=f"{type(error).__name__}: {error}")

    def discards(self, migration_id: str) -> list[tuple[int, int]]:
        """Return the runs of pages that were noted as given away; a last one that is torn was not acted on."""
        with contextlib.suppress(FileNotFoundError):
            with self._notes(migration_id).open("rb") as notes:
                content = notes.read(_MAX_DISCARDS * _DISCARD.size)
            whole = len(content) - len(content) % _DISCARD.size
            return list(_DISCARD.iter_unpack(content[:whole]))
        return []

    def _entry(self, migration_id: str) -> Path:
        return self._directory / f"{migration_id}.json"

    def _readied(self, migration_id: str) -> Path:
        return self._directory / f"{migration_id}.new"

    def _notes(self, migration_id: str) -> Path:
        return self._directory / f"{migration_id}.discards"


def _read(path: Path) -> Arriving:
    with path.open("rb") as file:
        text, _, digest = file.read(_MAX_ENTRY_BYTES).rpartition(b"\n")
    if digest != _digest(text):
        raise ValueError("it is torn or was changed")
    content = json.loads(text)
    if content["version"] != VERSION:
        raise ValueError(f"it is of version {content['version']}, and {VERSION} is known")
    prepare = json_format.ParseDict(content["prepare"], incoming_pb2.PrepareRequest())
    layout = json_format.ParseDict(content["layout"], memory_pb2.MemoryLayout())
    addresses = [int(address) for address in content["addresses"]]
    return Arriving(str(content["address"]), int(content["pid"]), prepare, layout, addresses)


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _unwritable(migration_id: str, directory: Path, error: OSError) -> FerryError:
    return FerryError(
        Reason.NO_SPACE, f"migration {migration_id} cannot be noted in {directory}: {error.strerror}; make room there"
    )


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
