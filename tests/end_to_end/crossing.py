"""One guest on its way between two sidecars, and what is said about it."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from child import DEADLINE, Child
from moving_guest import Guest
from sidecar_process import Sidecar

from pageferry.client import SidecarClient, ended
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles
from pageferry.v1 import migration_pb2 as pb

POSTCOPY = pb.MIGRATION_STATE_POSTCOPY
PAUSED = pb.MIGRATION_STATE_POSTCOPY_PAUSED
COMPLETED = pb.MIGRATION_STATE_COMPLETED
FAILED = pb.MIGRATION_STATE_FAILED
CANCELLED = pb.MIGRATION_STATE_CANCELLED
HANDING_OVER = pb.MIGRATION_STATE_HANDING_OVER
PREPARING = pb.MIGRATION_STATE_PREPARING

STAY = ("--working-set", "0.1")
"""Makes a process guest touch a tenth of its pages only: the rest comes by push, or never."""


async def until(condition: Callable[[], Awaitable[Any]], what: str, seconds: float = DEADLINE) -> Any:
    """Look again and again until the condition gives something true; return that."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                found = await condition()
                if found:
                    return found
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds:g} s: {what}") from None


@dataclass
class Crossing:
    """A guest registered at its source, and a VMM that waits for it at its destination."""

    guest_id: str
    source: Sidecar
    destination: Sidecar
    at_source: SidecarClient
    at_destination: SidecarClient
    guest: Guest
    waiting: Guest | None
    migration_id: str = ""

    async def start(self, request_id: str = "", address: str = "", **keywords: Any) -> pb.Migration:
        """Start it; keywords may be limits too."""
        given = [key for key in keywords if key in pb.Limits.DESCRIPTOR.fields_by_name]
        limits = pb.Limits(**{key: keywords.pop(key) for key in given})
        if self.destination.tls is not None:
            keywords.setdefault("destination_name", self.destination.name)
        migration = await self.at_source.start_migration(
            self.guest_id,
            address or self.destination.address,
            request_id=request_id or uuid.uuid4().hex,
            limits=limits,
            **keywords,
        )
        self.migration_id = migration.migration_id
        return migration

    async def seen(self, client: SidecarClient) -> pb.Migration | None:
        try:
            return await client.get_migration(self.migration_id)
        except FerryError as error:
            if error.reason is Reason.UNKNOWN_MIGRATION:
                return None
            raise

    async def becomes(self, client: SidecarClient, *states: int, seconds: float = DEADLINE) -> pb.Migration:
        """Wait until a sidecar shows one of the states; another final one fails at once."""

        async def look() -> pb.Migration | None:
            migration = await self.seen(client)
            if migration is None or migration.state in states:
                return migration
            assert not ended(migration), f"{pb.MigrationState.Name(migration.state)}: {migration.error}"
            return None

        found: pb.Migration = await until(look, f"{[pb.MigrationState.Name(state) for state in states]}", seconds)
        return found

    async def both_become(self, *states: int) -> tuple[pb.Migration, pb.Migration]:
        """Wait for it at both ends; return what the source and the destination show."""
        return await self.becomes(self.at_source, *states), await self.becomes(self.at_destination, *states)

    async def arrives(self) -> tuple[pb.Migration, pb.Migration]:
        """Wait until it is over; the guest runs on at the destination, whole, and its source VMM is gone."""
        left, came = await self.both_become(COMPLETED)
        assert self.waiting is not None
        await self.waiting.runs_on()
        await self.waiting.is_intact()
        await self.guest.exit_code()
        return left, came

    async def fails(self, *reasons: Reason) -> pb.Migration:
        """Wait until it has failed at the source, for such a reason, and the guest runs on there untouched."""
        migration = await self.becomes(self.at_source, FAILED)
        assert migration.error.reason in reasons, migration.error
        assert migration.error.message
        await self.runs_at_source()
        return migration

    async def runs_at_source(self) -> None:
        await self.guest.runs_on()
        assert self.guest.wrongs == []
        listed = {guest.guest_id: guest for guest in await self.at_source.list_guests()}
        assert listed[self.guest_id].state == pb.GUEST_STATE_RUNNING


@dataclass
class Stage:
    """Makes what a test needs, and takes it down after the test."""

    directory: Path
    stack: AsyncExitStack
    shared: tuple[str, ...] = ()
    """Addresses of sidecars that outlive the test."""
    _clients: dict[tuple[int, str], SidecarClient] = field(default_factory=dict)
    _registered: list[tuple[SidecarClient, str]] = field(default_factory=list)

    async def sidecar(self, name: str, make: type[Sidecar] = Sidecar, **settings: Any) -> Sidecar:
        return await self._made(lambda: make(self.directory, name, **settings))

    async def guest(self, name: str, *options: str, **keywords: Any) -> Guest:
        return await self._made(lambda: Guest(self.directory / f"{name}.sock", *options, **keywords))

    async def _made(self, make: Callable[[], Any]) -> Any:
        made: Child = await asyncio.to_thread(make)
        self.stack.callback(made.close)
        return made

    async def client(self, sidecar: Sidecar, tls: TlsFiles | None = None) -> SidecarClient:
        key = (sidecar.pid, str(tls))
        if key not in self._clients:
            self._clients[key] = await self.stack.enter_async_context(sidecar.client(tls))
        return self._clients[key]

    async def register(self, client: SidecarClient, guest_id: str, guest: Guest) -> None:
        await self.registered(client, guest_id, guest.socket_path)

    async def registered(self, client: SidecarClient, guest_id: str, socket_path: str, driver: str = "vmm") -> pb.Guest:
        """Register a guest, to be forgotten at the end."""
        found = await client.register_guest(guest_id, socket_path, driver)
        self._registered.append((client, guest_id))
        return found

    async def crossing(
        self,
        source: Sidecar,
        destination: Sidecar,
        *options: str,
        waiting_options: tuple[str, ...] = (),
        kind: str = "process",
        memory: str = "16M",
        waiting_memory: str = "",
        hostile: str | None = None,
        hostile_source: str | None = None,
        waits: bool = True,
        tls: TlsFiles | None = None,
    ) -> Crossing:
        """Start and register a guest at `source`, and unless told otherwise a VMM that waits at `destination`."""
        guest_id = f"guest-{uuid.uuid4().hex[:8]}"
        guest = self.guest(f"{guest_id}-a", *options, kind=kind, memory=memory, hostile=hostile_source)
        if not waits:
            running, waiting = await guest, None
        else:
            running, waiting = await asyncio.gather(
                guest,
                self.guest(
                    f"{guest_id}-b",
                    "--incoming",
                    *waiting_options,
                    kind=kind,
                    memory=waiting_memory or memory,
                    hostile=hostile,
                ),
            )
        clients = await self.client(source, tls), await self.client(destination, tls)
        await self.register(clients[0], guest_id, running)
        if waiting is not None:
            await self.register(clients[1], guest_id, waiting)
        return Crossing(guest_id, source, destination, *clients, running, waiting)

    async def leave(self) -> None:
        """Have guests forgotten by sidecars that outlive the test, as far as they still know them; end the rest."""
        registered, self._registered = self._registered, []
        gone = (Reason.UNKNOWN_GUEST, Reason.SIDECAR_UNREACHABLE)
        for client, guest_id in registered:
            try:
                await client.unregister_guest(guest_id)
            except FerryError as error:
                # A host that ends with the test may keep what it has.
                if error.reason not in gone and client.address in self.shared:
                    raise
        self._clients.clear()
        await self.stack.aclose()
        # Caught errors keep the frames of their calls, and those a closed channel, whose connection gRPC then keeps.
        gc.collect()
