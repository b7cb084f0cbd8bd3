"""Where this host's pages are served over bare sockets, beside gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferry.tls_sockets import server_context
from pageferryd.source.page_sockets import PageLane

if TYPE_CHECKING:
    from pageferry.v1 import page_pb2
    from pageferryd.config import Settings
    from pageferryd.source.page_service import PageService
    from pageferryd.source.served import Served

_log = structlog.get_logger(__name__)

_HANDSHAKE_SECONDS = 5.0
_MAX_HANDSHAKES = 64
_BACKLOG = 128
_UNIX_SUFFIX = ".lanes"


class LaneServer:
    """One listener. Certificates are read anew for each connection, so that renewed ones need no restart."""

    def __init__(self, settings: Settings, pages: PageService) -> None:
        self._settings = settings
        self._tls = settings.tls_files()
        self._peers = frozenset(settings.peers)
        self._pages = pages
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(_MAX_HANDSHAKES)
        self._lanes: set[PageLane] = set()
        self.address = ""
        """Where destinations reach it; empty where nothing is served."""

    async def start(self, page_address: str, bound: str) -> None:
        """Listen beside `bound`, where gRPC is; `page_address` is how destinations reach that.

        FerryError(ADDRESS_IN_USE) where the settings name an address and it cannot be had.
        """
        if not self._settings.lane_sockets:
            return
        asked = self._settings.lane_listen or _beside(bound, self._settings.listen)
        try:
            self._listener = _listen(asked, private=self._tls is None)
        except OSError as error:
            if self._settings.lane_listen is not None:
                raise FerryError(
                    Reason.ADDRESS_IN_USE,
                    f"cannot serve lanes at {asked}: {error.strerror}; choose another lane_listen",
                ) from error
            _log.warning("lanes_over_grpc_alone", address=asked, detail=error.strerror)
            return
        if addresses.is_unix(asked):
            self.address = asked
        else:
            # Whoever reaches this host's gRPC by a name reaches this port by it too.
            host = addresses.split(asked if addresses.is_unix(page_address) else page_address)[0]
            self.address = addresses.join(host, self._listener.getsockname()[1])
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def stop(self) -> None:
        """Hang up, and listen no more."""
        for task in (self._accepting, *self._handshakes):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for lane in list(self._lanes):
            lane.close()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            if addresses.is_unix(self.address):
                _unlink(self.address)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                self._room.release()
                # Out of descriptors, say: whoever knocks waits.
                _log.warning("lane_not_accepted", detail=error.strerror)
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._welcome(connection))
            self._handshakes.add(task)
            task.add_done_callback(self._welcomed)

    def _welcomed(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._room.release()

    async def _welcome(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            try:
                if self._tls is None:
                    await loop.connect_accepted_socket(self._lane, connection)
                else:
                    await loop.connect_accepted_socket(
                        self._lane,
                        connection,
                        ssl=server_context(self._tls),
                        ssl_handshake_timeout=_HANDSHAKE_SECONDS,
                    )
                undo.pop_all()
            except (OSError, FerryError) as error:
                _log.info("lane_handshake_failed", detail=str(error)[:200])

    def _lane(self) -> PageLane:
        lane = PageLane(self._authorise, self._lanes.discard)
        self._lanes.add(lane)
        return lane

    def _authorise(self, hello: page_pb2.LaneHello, names: frozenset[str]) -> Served:
        if self._tls is not None and self._peers and not names & self._peers:
            raise FerryError(
                Reason.PEER_NOT_ALLOWED,
                f"{', '.join(sorted(names))[:256] or 'a certificate without names'} may not have pages of this host: "
                "add a name of its certificate to peers",
            )
        return self._pages.authorised(hello.migration_id, hello.token, names)


def _beside(bound: str, asked: list[str]) -> str:
    """Return the address beside that of gRPC: the next port, any where that was any, or a path with a suffix."""
    if addresses.is_unix(bound):
        return bound + _UNIX_SUFFIX
    host, port = addresses.split(bound)
    first = next(address for address in asked if not addresses.is_unix(address))
    return addresses.join(host, 0 if addresses.split(first)[1] == 0 or port == 65535 else port + 1)


def _unlink(address: str) -> None:
    Path(address.removeprefix(addresses.UNIX_PREFIX)).unlink(missing_ok=True)


def _listen(address: str, *, private: bool) -> socket.socket:
    if addresses.is_unix(address):
        return _listen_unix(Path(address.removeprefix(addresses.UNIX_PREFIX)), private=private)
    host, port = addresses.split(address)
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_unix(path: Path, *, private: bool) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177 if private else 0o117)
    try:
        listener.setblocking(False)
        if path.is_socket():
            path.unlink()
        elif path.exists():
            raise OSError(errno.EEXIST, f"{path} is no socket")
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener
