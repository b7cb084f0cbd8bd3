"""Where a guest's VMM forwards its vCPUs' exits: a Unix socket of its own, or the hand-off's connection."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc

from pageferry.channel import SERVER_OPTIONS
from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2_grpc
from pageferryd.destination.fault_service import TOKEN_BYTES, FaultServicer
from pageferryd.destination.json_faults import JsonFaults
from pageferryd.linux.vmm_directory import VmmDirectory, give_to_owner_of_directory
from pageferryd.server import Guard
from pageferryd.vmm.driver import FaultEndpoint

if TYPE_CHECKING:
    from pageferryd.config import Settings
    from pageferryd.core.refusals import Refusals
    from pageferryd.destination.exit_door import ExitDoor
    from pageferryd.destination.handed_over import HandedOver
    from pageferryd.destination.session import Session

_SOCKET = "faults.sock"
MAX_CALLS = 16
"""Calls at once of one VMM, which needs one stream and a call for each thread that converts."""


class Faults:
    """One guest's. The socket belongs to the VMM's user, and whoever calls must show the VMM's secret."""

    def __init__(self, path: Path, endpoint: FaultEndpoint, server: grpc.aio.Server, servicer: FaultServicer) -> None:
        self.endpoint = endpoint
        self._path = path
        self._server = server
        self._servicer = servicer
        self._json: JsonFaults | None = None

    @classmethod
    async def start(
        cls, settings: Settings, directory: VmmDirectory, token: bytes = b"", refusals: Refusals | None = None
    ) -> Self:
        """Listen for the VMM of the directory; faults are refused until `connect`. FerryError(PERMISSION_MISSING).

        `token` is the VMM's secret where that has one already.
        """
        token = token or secrets.token_bytes(TOKEN_BYTES)
        servicer = FaultServicer(token)
        server = grpc.aio.server(
            interceptors=[Guard(settings, refusals)], options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        fault_pb2_grpc.add_FaultServiceServicer_to_server(servicer, server)
        path = directory.path / _SOCKET
        try:
            _bind(server, path)
        except (RuntimeError, OSError) as error:
            await server.stop(None)
            path.unlink(missing_ok=True)
            raise FerryError(Reason.PERMISSION_MISSING, f"cannot serve the VMM's faults at {path}: {error}") from error
        await server.start()
        return cls(path, FaultEndpoint(str(directory.seen / _SOCKET), token), server, servicer)

    def connect(self, door: ExitDoor, session: Session, memory: HandedOver) -> None:
        """Take faults for this door from now on."""
        self._servicer.connect(door, session)
        if memory.connection is not None:
            self._json = JsonFaults(memory.connection, door, memory.layout)
            self._json.open()

    async def stop(self) -> None:
        """Stop, and remove the socket."""
        if self._json is not None:
            self._json.close()
        await self._server.stop(None)
        self._path.unlink(missing_ok=True)


def _bind(server: grpc.aio.Server, path: Path) -> None:
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)
    give_to_owner_of_directory(path)
