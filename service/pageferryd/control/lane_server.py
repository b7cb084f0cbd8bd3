"""Where this host's pages are served over bare sockets, beside gRPC."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferry.tls_sockets import RenewedContext
from pageferryd.access import make_refusals
from pageferryd.control.lane_visits import Visit, Visits
from pageferryd.core import refusals as places
from pageferryd.source.page_sockets import PageLane

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferry.v1 import page_pb2
    from pageferryd.config import Settings
    from pageferryd.core.refusals import Refusals
    from pageferryd.source.page_service import PageService
    from pageferryd.source.served import Served

_log = structlog.get_logger(__name__)

_HANDSHAKE_SECONDS = 5.0
_BACKLOG = 128
_UNIX_SUFFIX = ".lanes"


class LaneServer:
    """One listener. Certificates are looked at anew for each connection, so that renewed ones need no restart."""

    def __init__(self, settings: Settings, pages: PageService, refusals: Refusals | None = None) -> None:
        """`refusals` is where callers that are refused are counted."""
        self._settings = settings
        self._tls = settings.tls_files()
        self._context: RenewedContext | None = None
        self._peers = frozenset(settings.peers)
        self._pages = pages
        self._refusals = refusals if refusals is not None else make_refusals()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._visits = Visits()
        self.address = ""
        """Where destinations reach it; empty where nothing is served."""

    async def start(self, page_address: str, bound: str) -> None:
        """Listen beside `bound`, where gRPC is; `page_address` is how destinations reach that.

        FerryError: ADDRESS_IN_USE where the settings name an address and it cannot be had, CONFIG_INVALID for
        certificates that cannot be used.
        """
        if not self._settings.lane_sockets:
            return
        if self._tls is not None:
            self._context = RenewedContext(self._tls)
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
        tasks = [task for task in (self._accepting, *self._handshakes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for visit in self._visits.all():
            visit.ends()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            if addresses.is_unix(self.address):
                _unlink(self.address)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, say: whoever knocks waits.
                _log.warning("lane_not_accepted", detail=error.strerror)
                await asyncio.sleep(0.1)
                continue
            visit = Visit(peer[0] if isinstance(peer, tuple) else "a local process")
            task = asyncio.create_task(self._welcome(connection, visit))
            visit.ends = task.cancel
            self._handshakes.add(task)
            task.add_done_callback(partial(self._welcomed, connection, visit))
            crowded_out = self._visits.came(visit)
            if crowded_out is not None:
                self._refused(crowded_out, Reason.LANE_SILENT, "it made room for others, and had not proved who it is")
                crowded_out.ends()

    async def _welcome(self, connection: socket.socket, visit: Visit) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        context = self._context.now() if self._context is not None else None
        try:
            await loop.connect_accepted_socket(
                partial(_Entrance, partial(self._enter, visit)),
                connection,
                ssl=context,
                ssl_handshake_timeout=None if context is None else _HANDSHAKE_SECONDS,
            )
        except OSError as error:
            self._refused(visit, _reason_of(error), f"the TLS handshake failed: {error}")
            self._visits.went(visit)
            connection.close()

    def _welcomed(self, connection: socket.socket, visit: Visit, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        # It may not even have begun.
        if task.cancelled():
            self._visits.went(visit)
            connection.close()

    def _enter(self, visit: Visit) -> PageLane:
        lane = PageLane(partial(self._authorise, visit), partial(self._gone, visit))
        visit.ends = lane.close
        return lane

    def _gone(self, visit: Visit, _lane: PageLane) -> None:
        if not visit.migration_id and not visit.refused:
            self._refused(visit, Reason.LANE_SILENT, "it has not said which pages it wants")
        self._visits.went(visit)

    def _authorise(self, visit: Visit, hello: page_pb2.LaneHello, names: frozenset[str]) -> Served:
        try:
            served = self._allowed(hello, names)
        except FerryError as error:
            self._refused(visit, error.reason, error.message, names)
            raise
        too_many = self._visits.proved(visit, served.migration_id)
        if too_many is not None:
            too_many.ends()
        return served

    def _allowed(self, hello: page_pb2.LaneHello, names: frozenset[str]) -> Served:
        if self._tls is not None and self._peers and not names & self._peers:
            raise FerryError(
                Reason.PEER_NOT_ALLOWED,
                f"{', '.join(sorted(names))[:256] or 'a certificate without names'} may not have pages of this host: "
                "add a name of its certificate to peers",
            )
        return self._pages.authorised(hello.migration_id, hello.token, names)

    def _refused(self, visit: Visit, reason: Reason, detail: str, names: frozenset[str] = frozenset()) -> None:
        visit.refused = True
        self._refusals.note(places.LANE, reason, ", ".join(sorted(names)) or visit.host, detail)


class _Entrance(asyncio.Protocol):
    """Stands before a lane until its connection is made: one whose handshake fails never comes to be."""

    def __init__(self, enter: Callable[[], PageLane]) -> None:
        self._enter = enter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in."""
        lane = self._enter()
        transport.set_protocol(lane)
        lane.connection_made(transport)


def _reason_of(error: OSError) -> Reason:
    """Return what it means that a handshake ended like this."""
    if isinstance(error, ssl.SSLError):
        return Reason.PEER_NOT_ALLOWED
    return Reason.LANE_SILENT if isinstance(error, ConnectionAbortedError) else Reason.LANE_LOST


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
