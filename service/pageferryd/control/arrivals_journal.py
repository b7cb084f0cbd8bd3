"""What a destination must know again after it was killed: the guests whose memory it was filling.

NAME.ready is written before the guest stops at its source, and becomes NAME.owned when the guest is this host's: so
that step needs no room, and is done or not. It becomes NAME.whole before its source is told that it has every page. One
that ends before is NAME.never, and one that was this host's and is no more without being whole NAME.lost: what the
source is told when it asks later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf import json_format

from pageferry.v1 import incoming_pb2, memory_pb2
from pageferryd.control.note_files import UnreadableNoteError
from pageferryd.linux.proc import is_process

if TYPE_CHECKING:
    from pageferryd.control.note_files import NoteFiles

_log = structlog.get_logger(__name__)

MAX_REMEMBERED = 256
"""Most migrations of each kind that ended otherwise than whole, and are told of when a source asks."""

_READY, _OWNED, _WHOLE, _NEVER, _LOST = ".ready", ".owned", ".whole", ".never", ".lost"
_DISCARDS = ".discards"
_STEPS = (_READY, _OWNED, _WHOLE, _NEVER, _LOST, _DISCARDS)
_DISCARD = struct.Struct("<QQ")
_MAX_DISCARDS = 1 << 22


@dataclass(frozen=True)
class Arriving:
    """A guest that is to become this host's, or is, and whose memory is not whole yet.

    `address` is its VMM's, `pid` and `started` (see linux/proc.py) its process, `prepare` what the source announced,
    `layout` the memory as it is filled here, and `addresses` are where its regions lie in the VMM. `kept` are the
    descriptors with which that can be gone on with, by name, with device and inode: none where it cannot. `fault_token`
    is the secret with which the VMM forwards faults. `whole`: every page was in place, and the source may know.
    """

    address: str
    pid: int
    started: int
    prepare: incoming_pb2.PrepareRequest
    layout: memory_pb2.MemoryLayout
    addresses: Sequence[int]
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fault_token: bytes = field(default=b"", repr=False)
    whole: bool = False

    @property
    def alive(self) -> bool:
        """Whether the VMM's process still is."""
        return is_process(self.pid, self.started)


class ArrivalsJournal:
    """The notes of one sidecar on guests that come. Errors in writing are FerryError(NO_SPACE)."""

    def __init__(self, notes: NoteFiles) -> None:
        self._notes = notes
        self._discards: dict[str, int] = {}

    def ready(self, arriving: Arriving) -> None:
        """Note a guest that is to become this host's, so that `owns` needs no room."""
        content = {
            "address": arriving.address,
            "pid": arriving.pid,
            "started": arriving.started,
            "prepare": json_format.MessageToDict(arriving.prepare),
            "layout": json_format.MessageToDict(arriving.layout),
            "addresses": list(arriving.addresses),
            "kept": {name: list(file_id) for name, file_id in arriving.kept.items()},
            "fault_token": arriving.fault_token.hex(),
        }
        self._notes.write(arriving.prepare.migration_id + _READY, content)

    def owns(self, migration_id: str) -> None:
        """Note, durably, that the guest is this host's from now on."""
        self._notes.rename(migration_id + _READY, migration_id + _OWNED)

    def whole(self, migration_id: str) -> None:
        """Note that every page is in place, before the source is told so, and may forget."""
        if self._notes.has(migration_id + _OWNED):
            self._notes.rename(migration_id + _OWNED, migration_id + _WHOLE)

    def discarded(self, migration_id: str, first: int, pages: int) -> None:
        """Note that the guest gave pages away: what the source has of them is stale."""
        try:
            fd = self._discards.get(migration_id)
            if fd is None:
                self._notes.make()
                path = self._notes.directory / (migration_id + _DISCARDS)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._discards[migration_id] = fd
                _cut_torn(fd)
            if os.write(fd, _DISCARD.pack(first, pages)) != _DISCARD.size:
                _cut_torn(fd)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._notes.unwritable(migration_id + _DISCARDS, error) from error

    def completed(self, migration_id: str) -> None:
        """Forget a guest that needs the sidecar no longer, or of which its source knows everything."""
        self._close_discards(migration_id)
        self._notes.remove(*(migration_id + suffix for suffix in _STEPS))

    def never_ran(self, migration_id: str) -> None:
        """Note that the guest has not run here and never will, where it was to: its source may ask."""
        self._end(migration_id, _READY, _NEVER)

    def lost(self, migration_id: str) -> None:
        """Note that the guest was this host's, and was given up before it was whole."""
        self._end(migration_id, _OWNED, _LOST)
        self._end(migration_id, _WHOLE, _LOST)

    def _end(self, migration_id: str, old: str, new: str) -> None:
        self._close_discards(migration_id)
        if not self._notes.has(migration_id + old):
            return
        self._notes.rename(migration_id + old, migration_id + new)
        self._notes.remove(migration_id + _DISCARDS)
        remembered = self._notes.stems(new)
        self._notes.remove(*(stem + new for stem in remembered[: max(len(remembered) - MAX_REMEMBERED, 0)]))

    def close(self) -> None:
        """Let files go; what they say stays."""
        for migration_id in list(self._discards):
            self._close_discards(migration_id)

    def _close_discards(self, migration_id: str) -> None:
        fd = self._discards.pop(migration_id, None)
        if fd is not None:
            os.close(fd)

    # What a later sidecar reads

    def owned(self) -> Iterator[Arriving]:
        """Yield the guests that an earlier sidecar owned; notes that cannot be read stay, and are logged."""
        yield from self._arriving(_OWNED)
        for arriving in self._arriving(_WHOLE):
            yield replace(arriving, whole=True)

    def readied(self) -> Iterator[Arriving]:
        """Yield the guests that an earlier sidecar was ready for, and that never ran here."""
        return self._arriving(_READY)

    def never_ran_here(self) -> Iterator[Arriving]:
        """Yield the guests that an earlier sidecar gave up before they ran."""
        return self._arriving(_NEVER)

    def _arriving(self, suffix: str) -> Iterator[Arriving]:
        for stem in self._notes.stems(suffix):
            try:
                yield _read(self._notes.read(stem + suffix))
            except UnreadableNoteError as error:
                _log.error("journal_unreadable", file=str(self._notes.directory / (stem + suffix)), detail=str(error))

    def unreadable(self, migration_id: str) -> bool:
        """Say whether there is a note of this guest that decides whose it is, and cannot be read."""
        return any(self._cannot_read(migration_id + suffix) for suffix in (_OWNED, _WHOLE, _READY, _NEVER, _LOST))

    def _cannot_read(self, name: str) -> bool:
        if not self._notes.has(name):
            return False
        try:
            _read(self._notes.read(name))
        except UnreadableNoteError:
            return True
        return False

    def ended_before(self, migration_id: str) -> incoming_pb2.PrepareRequest | None:
        """Return what was announced of a guest that never ran here, where that is known."""
        return self._prepare(migration_id + _NEVER)

    def was_lost(self, migration_id: str) -> incoming_pb2.PrepareRequest | None:
        """Return what was announced of a guest that was this host's and was given up."""
        return self._prepare(migration_id + _LOST)

    def _prepare(self, name: str) -> incoming_pb2.PrepareRequest | None:
        if not self._notes.has(name):
            return None
        try:
            return _read(self._notes.read(name)).prepare
        except UnreadableNoteError:
            return None

    def discards(self, migration_id: str) -> list[tuple[int, int]]:
        """Return the runs of pages that were noted as given away; a last one that is torn was not acted on."""
        with contextlib.suppress(FileNotFoundError):
            with (self._notes.directory / (migration_id + _DISCARDS)).open("rb") as notes:
                content = notes.read(_MAX_DISCARDS * _DISCARD.size)
            whole = len(content) - len(content) % _DISCARD.size
            return list(_DISCARD.iter_unpack(content[:whole]))
        return []


def _cut_torn(fd: int) -> None:
    """Cut off a record that was not written whole, so that those behind it are read as they are."""
    size = os.fstat(fd).st_size
    os.ftruncate(fd, size - size % _DISCARD.size)


def _read(content: dict[str, Any]) -> Arriving:
    try:
        return Arriving(
            str(content["address"]),
            int(content["pid"]),
            int(content["started"]),
            json_format.ParseDict(content["prepare"], incoming_pb2.PrepareRequest()),
            json_format.ParseDict(content["layout"], memory_pb2.MemoryLayout()),
            [int(address) for address in content["addresses"]],
            {str(name): (int(device), int(inode)) for name, (device, inode) in content["kept"].items()},
            bytes.fromhex(content["fault_token"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, json_format.ParseError) as error:
        raise UnreadableNoteError(f"{type(error).__name__}: {error}") from error
