"""Two sidecars that are ended and started again, and the wire between them that is cut and held."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from holds import Holds, WireHold
from lane_proxy import LaneProxy
from patience import Patient, started
from rpc_proxy import RpcProxy
from sidecar_process import Sidecar
from tcp_proxy import TcpProxy

from pageferry.client import SidecarClient, ended
from pageferry.errors import FerryError
from pageferry.v1 import migration_pb2 as pb

DRAIN_SECONDS = 0.3
EXIT_SECONDS = 20.0
LIMITS = {
    "prepare_timeout": 4.0,
    "handover_timeout": 4.0,
    "reconnect_initial_seconds": 0.05,
    "reconnect_max_seconds": 0.2,
    "lane_silence_timeout": 0.6,
}
REMEMBERED = (".never", ".lost", ".arrived")
"""What may stay in a journal: notes of migrations that ended, which the other end may ask about."""


class PatientSidecar(Patient, Sidecar):
    """A sidecar that is waited for patiently."""


class Host:
    """One sidecar, always at the same addresses and with the same runtime directory, whoever ends it."""

    def __init__(self, directory: Path, name: str, **settings: Any) -> None:
        self.name = name
        self._directory = directory
        # No outgoing connection ever takes a port of this address while the sidecar is away.
        self._settings = {
            "listen": [f"127.0.0.2:{_free_port('127.0.0.2')}"],
            "drain_seconds": DRAIN_SECONDS,
            **settings,
        }
        self._settings["runtime_dir"] = str(directory / f"{name}-run")
        self.lives: list[Sidecar] = []
        self._stack = AsyncExitStack()

    @property
    def address(self) -> str:
        return str(self._settings["listen"][0])

    @property
    def sidecar(self) -> Sidecar:
        return self.lives[-1]

    async def start(self) -> None:
        """Start it, for the first time or again, and make a client of it."""
        await self._stack.aclose()
        self.lives.append(await started(partial(PatientSidecar, self._directory, self.name, **self._settings)))
        self.client: SidecarClient = await self._stack.enter_async_context(self.sidecar.client())

    async def kill(self) -> None:
        self.sidecar.process.kill()
        await self.sidecar.exit_code()

    async def told_to_end(self) -> None:
        """Send SIGTERM, and wait until it drains."""
        since = len(self.sidecar.events)
        self.sidecar.signal(signal.SIGTERM)
        await self.sidecar.event("draining", since)

    async def ends(self) -> None:
        """Wait until it has ended by itself."""
        code = await asyncio.to_thread(self.sidecar.process.wait, EXIT_SECONDS)
        assert code == 0, f"{self.name} ended with {code}"

    async def close(self) -> None:
        await self._stack.aclose()
        for life in self.lives:
            await asyncio.to_thread(life.close)

    async def active(self) -> list[pb.Migration]:
        """Return the migrations that are not over."""
        return [migration for migration in await self.client.list_migrations() if not ended(migration)]

    async def shown(self, migration_id: str) -> pb.Migration | None:
        """Return a migration as it is seen here, or None where it is not known, or nobody answers."""
        try:
            return await self.client.get_migration(migration_id)
        except FerryError:
            return None

    async def register(self, guest_id: str, socket_path: str, driver: str) -> None:
        """Register a guest, if its VMM answers: a sidecar that ends forgets what it was only told."""
        with contextlib.suppress(FerryError):
            await self.client.register_guest(guest_id, socket_path, driver)

    async def forget(self, guest_id: str) -> None:
        # Where it did not start again, there is no client.
        with contextlib.suppress(FerryError, RuntimeError):
            await self.client.unregister_guest(guest_id)

    def leftovers(self) -> list[str]:
        """Return what lies in the runtime directory and should not, once nothing is under way."""
        run = self.sidecar.runtime_dir
        found = [path.name for path in run.iterdir() if path.name != "journal.d"]
        journal = run / "journal.d"
        if journal.exists():
            found += [path.name for path in journal.iterdir() if path.suffix not in REMEMBERED]
        return found

    def log(self, lines: int = 25) -> str:
        """Return the ends of the logs of its last lives."""
        told: list[str] = []
        for life in self.lives[-3:]:
            told.append(f"-- {self.name}, process {life.pid}")
            told += [_line(event) for event in _without_repeats(life.events)[-lines:]]
            told += [text.rstrip() for text in life.other_lines[-lines:]]
        return "\n".join(told)


def _without_repeats(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return events without those that one of the same name goes on to repeat."""
    told = list(events)
    return [
        event for event, after in zip(told, [*told[1:], {}], strict=True) if event.get("event") != after.get("event")
    ]


def _line(event: dict[str, Any]) -> str:
    hidden = ("event", "level", "timestamp")
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in hidden)
    return f"   {str(event.get('timestamp', ''))[11:23]} {event.get('event')} {rest}"


class Wire:
    """All that lies between the hosts: each call passes a proxy that can be cut, and one that holds messages."""

    def __init__(self) -> None:
        self.holds = Holds()
        self.lanes = LaneProxy()
        self._pipes: list[TcpProxy] = []

    async def connect(self, stack: AsyncExitStack, address: str) -> str:
        """Lead to a gRPC server at `address`; return the way in."""
        rpc = await stack.enter_async_context(RpcProxy(address))
        rpc.holds = self.holds
        return (await self._pipe(stack, rpc.address)).address

    async def connect_lanes(self, stack: AsyncExitStack, lane_listen: str) -> None:
        self.lanes.target = (await self._pipe(stack, lane_listen)).address

    async def _pipe(self, stack: AsyncExitStack, target: str) -> TcpProxy:
        pipe = await stack.enter_async_context(TcpProxy(target))
        self._pipes.append(pipe)
        return pipe

    def hold(self, call: str, phase: str, nth: int, seconds: float) -> WireHold:
        return self.holds.arm(call, phase, nth, seconds)

    def cut(self) -> None:
        for pipe in self._pipes:
            pipe.cut()

    def stall(self) -> None:
        for pipe in self._pipes:
            pipe.stall()

    def heal(self) -> None:
        for pipe in self._pipes:
            pipe.heal()

    def clear(self) -> None:
        """Be whole, and hold nothing."""
        self.heal()
        self.holds.clear()
        self.lanes.refuses = False


class Pair:
    """A source, a destination and the wire between them. `async with` runs them."""

    def __init__(self, directory: Path, number: int, limits: dict[str, Any] | None = None) -> None:
        """`limits` are those of both sidecars, in place of LIMITS."""
        self._limits = LIMITS if limits is None else limits
        self._directory = directory
        self._number = number
        self._stack = AsyncExitStack()
        self.wire = Wire()

    async def __aenter__(self) -> Self:
        wire, stack = self.wire, self._stack
        try:
            await stack.enter_async_context(wire.lanes)
            wire.lanes.holds = wire.holds
            # Destinations ask for lanes at the advertised host and the lanes' port: there the proxy listens.
            lane_listen = f"127.0.0.2:{wire.lanes.address.rpartition(':')[2]}"
            await wire.connect_lanes(stack, lane_listen)
            self.destination = Host(self._directory, f"d{self._number}", limits=self._limits)
            port = _free_port("127.0.0.2")
            self.pages = await wire.connect(stack, f"127.0.0.2:{port}")
            self.source = Host(
                self._directory,
                f"s{self._number}",
                listen=[f"127.0.0.2:{port}"],
                lane_listen=lane_listen,
                advertise=self.pages,
                limits=self._limits,
            )
            self.incoming = await wire.connect(stack, self.destination.address)
            for host in (self.source, self.destination):
                stack.push_async_callback(host.close)
            async with asyncio.TaskGroup() as starting:
                for host in self.hosts:
                    starting.create_task(host.start())
        except BaseException:
            await stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wire.clear()
        await self._stack.aclose()

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.source, self.destination


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
