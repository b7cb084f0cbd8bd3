"""The same guests, moved by two sidecars."""

from __future__ import annotations

import uuid
from contextlib import aclosing

from qemu_ends import Ends, Moved

from pageferry.client import SidecarClient, ended
from pageferry.demo.sidecars import Sidecar
from pageferry.v1 import migration_pb2 as pb


class Ferry:
    """Two sidecars that stay for all migrations."""

    def __init__(self, source: Sidecar, destination: Sidecar) -> None:
        self._source = source
        self._destination = destination

    async def move(self, ends: Ends) -> Moved:
        """Move the guest with push unlimited, and have both sidecars forget it."""
        name = f"guest-{uuid.uuid4().hex[:12]}"
        async with self._source.client() as source, self._destination.client() as destination:
            await source.register_guest(name, str(ends.source.qmp_path), "qemu")
            await destination.register_guest(name, str(ends.destination.qmp_path), "qemu")
            await ends.begin()
            migration = await source.start_migration(name, self._destination.address, request_id=uuid.uuid4().hex)
            await _watch(source, migration.migration_id, until_it_runs=True)
            last = await _watch(destination, migration.migration_id)
            moved = last.progress.demand_bytes + last.progress.push_bytes
            # The source ends the VMM that the guest has left.
            await _watch(source, migration.migration_id)
            await destination.unregister_guest(name)
        return Moved(last.postcopy_duration.ToTimedelta().total_seconds() * 1e3, moved)


async def _watch(client: SidecarClient, migration_id: str, *, until_it_runs: bool = False) -> pb.Migration:
    async with aclosing(client.watch_migration(migration_id)) as looks:
        async for look in looks:
            if ended(look) or (until_it_runs and look.HasField("downtime")):
                break
    if ended(look) and look.state != pb.MIGRATION_STATE_COMPLETED:
        raise RuntimeError(f"the migration ended as {pb.MigrationState.Name(look.state)}: {look.error.message}")
    return look
