"""pageferryd: the process that runs on every host. Puts the parts together, and takes them down in order."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer
import uvloop

from pageferry import __version__
from pageferry.errors import FerryError, Reason
from pageferry.v1 import incoming_pb2_grpc, migration_pb2_grpc
from pageferryd import config, logs
from pageferryd.access import make_refusals
from pageferryd.control.book import MigrationBook
from pageferryd.control.departure import PageAddresses
from pageferryd.control.drain import Drain
from pageferryd.control.incoming_service import IncomingServicer
from pageferryd.control.journal import Journal
from pageferryd.control.lane_server import LaneServer
from pageferryd.control.migration_service import MigrationServicer
from pageferryd.control.recovery import recover_arrivals, recover_departures
from pageferryd.control.registry import GuestRegistry
from pageferryd.control.surroundings import Surroundings
from pageferryd.control.templates import VmmStarter
from pageferryd.control.turns import Turns
from pageferryd.core.push_share import PushShare
from pageferryd.http import HttpServer
from pageferryd.keeper.running import become
from pageferryd.linux.allocator import tune_malloc
from pageferryd.linux.fd_store import FdStore
from pageferryd.metrics import make_registry
from pageferryd.server import GrpcServer
from pageferryd.source.page_service import PageService
from pageferryd.vmm.every import drivers

if TYPE_CHECKING:
    from pageferryd.config import ConfiguredGuest, Settings

_log = structlog.get_logger(__name__)

_LAST_CALLS_SECONDS = 0.5
_LAST_STEPS_SECONDS = 15.0


class Sidecar:
    """One sidecar, made in the event loop that it runs in."""

    def __init__(self, settings: Settings, store: FdStore) -> None:
        self._settings = settings
        self._store = store
        self._drain = Drain()
        self._guests = GuestRegistry(drivers(settings.runtime_dir))
        self._starter = VmmStarter(
            settings.templates, self._guests, settings.runtime_dir, settings.limits.max_migrations
        )
        self._pages = PageService(secure=not settings.insecure)
        refusals = make_refusals()
        self._book = MigrationBook(settings.limits.max_migrations, self._pages.withdraw, refusals)
        # With a dot: no migration's id, after which directories beside it are named, has one.
        journal = Journal(settings.runtime_dir / "journal.d")
        turns = Turns(settings.limits.max_outgoing)
        share = PushShare(settings.limits.host_push_bytes_per_second, time.monotonic())
        self._around = Surroundings(
            settings, settings.tls_files(), self._guests, journal, turns, share, store, refusals
        )
        self._grpc = GrpcServer(settings, refusals)
        self._lanes = LaneServer(settings, self._pages, refusals)
        self._http = HttpServer(make_registry(self._book), self._unready)
        self._bound: list[str] = []
        self._add_services()

    def _add_services(self) -> None:
        server, around = self._grpc.server, self._around
        migrations = MigrationServicer(self._book, around, self._pages, self._page_addresses, self._drain)
        migration_pb2_grpc.add_MigrationServiceServicer_to_server(migrations, server)
        incoming_pb2_grpc.add_IncomingServiceServicer_to_server(
            IncomingServicer(self._book, around, self._drain, self._starter), server
        )
        self._pages.add_to(server)

    def _page_addresses(self) -> PageAddresses:
        return PageAddresses(self._page_address(), self._lanes.address)

    def _page_address(self) -> str:
        return self._settings.page_address(self._bound)

    def _unready(self) -> list[str]:
        return ["draining: this sidecar is shutting down"] if self._drain.begun else []

    async def start(self) -> None:
        """Serve. Raises FerryError where that cannot be, and leaves nothing behind."""
        _make_runtime_dir(self._settings.runtime_dir)
        try:
            for guest in self._settings.guests:
                await self._register(guest)
            # Before anybody asks for them.
            await recover_arrivals(self._around, self._book)
            await recover_departures(self._around, self._book, self._pages)
            http = await self._serve()
            # What nobody took up belongs to migrations that have ended.
            await asyncio.to_thread(self._store.close_untaken)
            await asyncio.to_thread(self._store.ready)
        except BaseException:
            await self._guests.close()
            raise
        _log.info(
            "ready",
            host=self._settings.host,
            listen=self._bound,
            lanes=self._lanes.address,
            http=http,
            release=__version__,
        )

    async def _serve(self) -> str:
        self._bound = await self._grpc.start()
        try:
            await self._lanes.start(self._page_address(), self._settings.page_bound(self._bound))
            return await self._http.start(self._settings.http)
        except BaseException:
            await self._lanes.stop()
            await self._grpc.stop(0)
            raise

    async def _register(self, guest: ConfiguredGuest) -> None:
        """Register a guest of the settings; its VMM may come up later, and another one after it."""
        await self._guests.register(guest.name, guest.driver, str(guest.endpoint), must_answer=False, lasting=True)
        _log.info("guest_registered", guest=guest.name, driver=guest.driver, endpoint=str(guest.endpoint))

    async def stop(self) -> None:
        """Take nothing new, see through what is under way for as long as `drain_seconds`, and end."""
        self._drain.begin()
        try:
            await asyncio.to_thread(self._store.stopping)
        except FerryError as error:
            _log.warning("manager_does_not_listen", detail=error.message)
        await self._grpc.set_serving(serving=False)
        active = list(self._book.active())
        _log.info("draining", migrations=len(active), seconds=self._settings.drain_seconds if active else 0)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                for mover in active:
                    while not mover.record.state.final:
                        await mover.record.changes.wait(1.0)
        except TimeoutError:
            _log.warning("drain_incomplete", migrations=sum(1 for _ in self._book.active()))
        # Those that have ended, too: of some the VMM is still being ended.
        for mover in list(self._book.newest_first()):
            await mover.stop()
        await self._starter.close()
        await self._guests.close()
        self._around.journal.close()
        await self._lanes.stop()
        await self._http.stop()
        # With a live stream stop() would wait all of a longer grace.
        await self._grpc.stop(_LAST_CALLS_SECONDS)
        _log.info("stopped")


def _make_runtime_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING, f"cannot make the runtime directory {path}: {error.strerror}; set runtime_dir"
        ) from error


async def _serve(settings: Settings, store: FdStore) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    sidecar = Sidecar(settings, store)
    await sidecar.start()
    # What was loaded stays: going through it again and again would stop guests' faults for milliseconds.
    gc.collect()
    gc.freeze()
    for name in config.unread_environment():
        _log.warning("unknown_environment_variable", variable=name)
    await ended.wait()
    await sidecar.stop()


def _run(
    config_file: Annotated[Path | None, typer.Option("--config", help="Configuration file (TOML).")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; everything must be loopback.")] = False,
    host: Annotated[str | None, typer.Option(help="This host's name, as in its certificate.")] = None,
    listen: Annotated[list[str] | None, typer.Option(help="Address to serve gRPC at; may be repeated.")] = None,
    http: Annotated[str | None, typer.Option(help="Address of /metrics, /healthz and /readyz.")] = None,
    api_socket: Annotated[Path | None, typer.Option(help="Unix socket for this host's operators.")] = None,
    runtime_dir: Annotated[Path | None, typer.Option(help="Directory of hand-off sockets.")] = None,
    log_format: Annotated[str | None, typer.Option(help="json or console.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    keeper: Annotated[
        bool, typer.Option("--keeper", help="Hold guests' memory across restarts, where systemd does not.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the release and exit.")] = False,
) -> None:
    """Move running guests between hosts: one pageferryd a host."""
    if version:
        typer.echo(f"pageferryd {__version__}")
        return
    given: dict[str, Any] = {
        "host": host,
        "listen": listen or None,
        "http": http,
        "api_socket": api_socket,
        "runtime_dir": runtime_dir,
        "log_format": log_format,
        "log_level": log_level,
        "insecure": insecure or None,
    }
    try:
        settings = config.load(config_file, {key: value for key, value in given.items() if value is not None})
        if keeper:
            # The sidecar may take as long as it drains, and then some.
            become(
                [word for word in sys.argv[1:] if word != "--keeper"],
                settings.runtime_dir,
                stop_seconds=settings.drain_seconds + _LAST_STEPS_SECONDS,
                log_format=settings.log_format,
            )
        # Before there is any thread, or process to inherit what it takes over.
        store = FdStore.from_environment(os.environ)
        logs.configure(settings.log_format, settings.log_level)
        tune_malloc()
        uvloop.run(_serve(settings, store))
    except FerryError as error:
        print(f"pageferryd: {error.reason.value}: {error.message}", file=sys.stderr)
        raise typer.Exit(2) from error


def main() -> None:
    """Run the command."""
    typer.run(_run)


if __name__ == "__main__":
    main()
