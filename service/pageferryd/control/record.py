"""What is known of one migration, at either end, and how others wait for it to change."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Self

from pageferry.errors import FerryError
from pageferry.v1 import incoming_pb2, migration_pb2
from pageferryd.core.lifecycle import Lifecycle, State

MIGRATION_ID = re.compile(r"[A-Za-z0-9]{1,32}")
"""Ids of migrations: parts of sockets' paths and of metadata, and names of directories.

Nothing else in a runtime directory is named so.
"""


class Changes:
    """Wakes everybody who waits for the next change."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Something changed."""
        waited_for, self._next = self._next, None
        if waited_for is not None and not waited_for.done():
            waited_for.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Wait for the next change, at most that long."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._next], timeout=seconds)


@dataclass(slots=True)
class MigrationRecord:
    """One migration. Times are seconds since the epoch, durations seconds."""

    migration_id: str
    request_id: str
    guest_id: str
    role: migration_pb2.Role.ValueType
    source_name: str
    destination_name: str
    destination_address: str
    limits: migration_pb2.Limits
    policy: migration_pb2.Policy = field(default_factory=migration_pb2.Policy)
    queue_position: int = 0
    created: float = field(default_factory=time.time)
    ended: float | None = None
    downtime: float | None = None
    postcopy_seconds: float | None = None
    huge_bytes: int = 0
    error: FerryError | None = None
    lifecycle: Lifecycle = field(init=False)
    changes: Changes = field(default_factory=Changes)

    @classmethod
    def of_arriving(cls, prepare: incoming_pb2.PrepareRequest, host: str) -> Self:
        """Return the record of a guest that comes to `host`, as its source announced it."""
        return cls(
            migration_id=prepare.migration_id,
            request_id="",
            guest_id=prepare.guest_id,
            role=migration_pb2.ROLE_DESTINATION,
            source_name=prepare.source_name,
            destination_name=host,
            destination_address="",
            limits=prepare.limits,
            policy=prepare.policy,
        )

    @classmethod
    def of_leaving(cls, migration: migration_pb2.Migration) -> Self:
        """Return the record of a guest that an earlier sidecar of this host was handing over."""
        return cls(
            migration_id=migration.migration_id,
            request_id=migration.request_id,
            guest_id=migration.guest_id,
            role=migration_pb2.ROLE_SOURCE,
            source_name=migration.source_name,
            destination_name=migration.destination_name,
            destination_address=migration.destination_address,
            limits=migration.limits,
            policy=migration.policy,
            created=migration.create_time.ToNanoseconds() / 1e9,
        )

    def __post_init__(self) -> None:
        self.lifecycle = Lifecycle(self._moved)

    @property
    def state(self) -> State:
        """Where the migration stands."""
        return self.lifecycle.state

    def _moved(self, _old: State, new: State) -> None:
        if new.final:
            self.ended = time.time()
        self.changes.notify()

    def fail(self, error: FerryError) -> None:
        """End it as failed, unless it has ended."""
        if not self.state.final:
            self.error = _bare(error)
            self.lifecycle.to(State.FAILED)

    def trouble(self, error: FerryError | None) -> None:
        """Note what goes wrong while it goes on; None when it is over."""
        self.error = None if error is None else _bare(error)
        self.changes.notify()


def _bare(error: FerryError) -> FerryError:
    """Return the error without its traceback: the frames in it would keep connections open as long as the record."""
    return FerryError(error.reason, error.message)
