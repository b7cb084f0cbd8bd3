"""What a source must know again after it was killed: the guests that it was handing over, and whether they had gone.

NAME.leaving is written before the guest stops: it is this host's, and goes on here whatever else was done. It becomes
NAME.given before the destination is told to run it: from then on the guest may have run there. NAME.arrived says that
the destination has every page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf import json_format

from pageferry.v1 import memory_pb2, migration_pb2
from pageferryd.control.note_files import UnreadableNoteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.control.note_files import NoteFiles

_log = structlog.get_logger(__name__)


class Step(Enum):
    """How far a guest had gone."""

    LEAVING = ".leaving"
    """It is this host's; it may stand still."""
    GIVEN = ".given"
    """It may have run at the destination."""
    ARRIVED = ".arrived"
    """The destination has every page of it."""


@dataclass(frozen=True)
class LeftMemory:
    """Where a guest's memory is while it leaves, as of vmm/driver.Memory; `started` tells the holder's process."""

    layout: memory_pb2.MemoryLayout
    locations: Sequence[memory_pb2.MemoryLocation]
    holder: int
    started: int
    private: Sequence[tuple[int, int]] = ()
    """Ranges of (guest address, bytes) that are private to the guest."""
    opaque: bool = False
    files: Sequence[str] = ()
    """Names under which what outlives the VMM may be stored."""


@dataclass(frozen=True)
class Leaving:
    """A guest on its way out. `migration` is what was asked for; its memory is known once the guest stands still."""

    migration: migration_pb2.Migration
    driver: str
    address: str
    pid: int
    started: int
    token: bytes = field(repr=False)
    memory: LeftMemory | None = None


class DeparturesJournal:
    """The notes of one sidecar on guests that leave. Errors in writing are FerryError(NO_SPACE)."""

    def __init__(self, notes: NoteFiles) -> None:
        self._notes = notes

    def leaves(self, leaving: Leaving) -> None:
        """Note a guest that is about to stop, or once more with its memory."""
        memory = leaving.memory
        content = {
            "migration": json_format.MessageToDict(leaving.migration),
            "driver": leaving.driver,
            "address": leaving.address,
            "pid": leaving.pid,
            "started": leaving.started,
            "token": leaving.token.hex(),
            "memory": _memory_to_json(memory) if memory is not None else None,
        }
        self._notes.write(leaving.migration.migration_id + Step.LEAVING.value, content)

    def given(self, migration_id: str) -> None:
        """Note, durably, that the guest may run at its destination from now on."""
        self._notes.rename(migration_id + Step.LEAVING.value, migration_id + Step.GIVEN.value)

    def taken_back(self, migration_id: str) -> None:
        """Note, durably, that the guest is this host's again: it has not run at its destination, and never will."""
        if self._notes.has(migration_id + Step.GIVEN.value):
            self._notes.rename(migration_id + Step.GIVEN.value, migration_id + Step.LEAVING.value)

    def arrived(self, migration_id: str) -> None:
        """Note, durably, that the destination has every page."""
        if self._notes.has(migration_id + Step.GIVEN.value):
            self._notes.rename(migration_id + Step.GIVEN.value, migration_id + Step.ARRIVED.value)

    def ended(self, migration_id: str) -> None:
        """Forget a guest that nobody can ask about any more."""
        self._notes.remove(*(migration_id + step.value for step in Step))

    def unfinished(self) -> Iterator[tuple[Leaving, Step]]:
        """Yield the guests that an earlier sidecar was handing over; notes that cannot be read stay, and are logged."""
        for step in Step:
            for stem in self._notes.stems(step.value):
                name = stem + step.value
                try:
                    yield _read(self._notes.read(name)), step
                except UnreadableNoteError as error:
                    _log.error("journal_unreadable", file=str(self._notes.directory / name), detail=str(error))


def _memory_to_json(memory: LeftMemory) -> dict[str, Any]:
    return {
        "layout": json_format.MessageToDict(memory.layout),
        "locations": [json_format.MessageToDict(location) for location in memory.locations],
        "holder": memory.holder,
        "started": memory.started,
        "private": [list(run) for run in memory.private],
        "opaque": memory.opaque,
        "files": list(memory.files),
    }


def _read(content: dict[str, Any]) -> Leaving:
    try:
        memory = content["memory"]
        return Leaving(
            json_format.ParseDict(content["migration"], migration_pb2.Migration()),
            str(content["driver"]),
            str(content["address"]),
            int(content["pid"]),
            int(content["started"]),
            bytes.fromhex(content["token"]),
            _memory_from_json(memory) if memory is not None else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, json_format.ParseError) as error:
        raise UnreadableNoteError(f"{type(error).__name__}: {error}") from error


def _memory_from_json(content: dict[str, Any]) -> LeftMemory:
    return LeftMemory(
        json_format.ParseDict(content["layout"], memory_pb2.MemoryLayout()),
        [json_format.ParseDict(location, memory_pb2.MemoryLocation()) for location in content["locations"]],
        int(content["holder"]),
        int(content["started"]),
        [(int(address), int(size)) for address, size in content["private"]],
        bool(content["opaque"]),
        [str(name) for name in content["files"]],
    )
