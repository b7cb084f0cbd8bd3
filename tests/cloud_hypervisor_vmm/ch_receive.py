"""The destination's side of a local migration; runs in a thread."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ch_wire import (
    COMPLETE,
    COMPLETE_PAUSED,
    CONFIG,
    ERROR,
    MEMORY_FD,
    OK,
    START,
    STATE,
    ProtocolError,
    hang,
    read_exactly,
    read_request,
    receive_slot,
    respond,
)

if TYPE_CHECKING:
    from ch_vm import Vmm

NAMES = {START: "start", MEMORY_FD: "slot", CONFIG: "config", STATE: "state", COMPLETE: "complete"}
FAULT_CONNECTION_SECONDS = 30.0


@dataclass
class Received:
    mode: str
    files: dict[int, int]
    config: dict[str, Any]
    state: bytes = b""


def receive(vmm: Vmm, path: str, mode: str, loop: asyncio.AbstractEventLoop) -> None:
    """Receive a VM; ProtocolError where the migration is aborted."""
    if vmm.behave == "never-listens":
        hang()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(128)
        listener.settimeout(FAULT_CONNECTION_SECONDS)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(None)
            walk = _Walk(vmm, listener, connection, Received(mode, {}, {}), loop)
            expected: tuple[int, ...] = (START,)
            while expected:
                command, headers, length = read_request(connection)
                if command not in expected:
                    respond(connection, ERROR)
                    raise ProtocolError(f"can't handle command {command} where {expected} are due")
                try:
                    expected = walk.take(command, headers, length)
                except Exception as error:
                    respond(connection, ERROR)
                    raise ProtocolError(f"command {command} failed: {error}") from error
                respond(connection, OK)


class _Walk:
    def __init__(
        self,
        vmm: Vmm,
        listener: socket.socket,
        connection: socket.socket,
        received: Received,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._vmm = vmm
        self._listener = listener
        self._connection = connection
        self._received = received
        self._loop = loop

    def take(self, command: int, headers: bytes, length: int) -> tuple[int, ...]:
        """Take one command; return what may be next."""
        name = NAMES.get(command, "complete")
        behave = self._vmm.behave
        if behave == f"dies-at-{name}":
            os._exit(1)
        if behave == f"silent-at-{name}":
            hang()
        payload = b"" if command in (START, MEMORY_FD) else read_exactly(self._connection, length)
        if behave == f"refuses-{name}":
            raise ProtocolError(f"{name} is not wanted")
        match command:
            case 1:
                if headers != bytes(6) or length:
                    raise ProtocolError(f"protocol version {headers.hex()}")
                return MEMORY_FD, CONFIG
            case 7:
                slot, fd = receive_slot(self._connection)
                self._received.files[slot] = fd
                return MEMORY_FD, CONFIG
            case 2:
                self._configure(payload)
                return (STATE,)
            case 3:
                self._restore(payload)
                return COMPLETE, COMPLETE_PAUSED
            case 5:
                self._loop.call_soon_threadsafe(self._vmm.run)
        return ()

    def _configure(self, payload: bytes) -> None:
        self._received.config = json.loads(payload)
        # releases after v53 are told here.
        if "memory_mode" not in self._received.config:
            raise ProtocolError("the config does not say how the memory comes")
        self._vmm.configured(self._received.config, self._received.files)

    def _restore(self, payload: bytes) -> None:
        modes = {self._received.mode, self._received.config["memory_mode"]}
        if modes == {"Postcopy"} and self._vmm.behave != "ignores-postcopy":
            faults, _ = self._listener.accept()
            faults.settimeout(None)
            role = struct.unpack("<H", read_exactly(faults, 2))[0]
            if role != 2:
                raise ProtocolError(f"unknown connection role: {role}")
            self._vmm.serve_faults(faults)
        self._received.state = payload
        self._vmm.restored(self._received)
