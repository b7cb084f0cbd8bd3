"""The bytes of Cloud Hypervisor's migration protocol, blocking."""

from __future__ import annotations

import array
import select
import socket
import struct
import time
from pathlib import Path

START, CONFIG, STATE, MEMORY, COMPLETE, ABANDON, MEMORY_FD, COMPLETE_PAUSED, PAGE_FAULT = range(1, 10)
OK, ERROR = 1, 2
FOREVER = 3600.0


class ProtocolError(Exception):
    """The peer does not keep to the protocol, or refused."""


def request(command: int, length: int = 0, version: int = 0) -> bytes:
    headers = struct.pack("<H", version) + bytes(4) if command == START else bytes(6)
    return struct.pack("<H", command) + headers + struct.pack("<Q", length)


def read_exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(min(1 << 20, length - len(data)))
        if not part:
            raise ProtocolError(f"the peer hung up after {len(data)} of {length} bytes")
        data += part
    return data


def read_request(connection: socket.socket) -> tuple[int, bytes, int]:
    header = read_exactly(connection, 16)
    command, length = struct.unpack("<H6xQ", header)
    if not START <= command <= PAGE_FAULT:
        raise ProtocolError(f"unknown command {command}")
    return command, header[2:8], length


def respond(connection: socket.socket, status: int) -> None:
    connection.sendall(struct.pack("<H6xQ", status, 0))


def expect_ok(connection: socket.socket, what: str) -> int:
    """Return the length of what follows."""
    status, length = struct.unpack("<H6xQ", read_exactly(connection, 16))
    if status != OK:
        raise ProtocolError(f"the peer refused {what} (status {status})")
    return length


def send_slot(connection: socket.socket, slot: int, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([struct.pack("<I", slot)], rights)


def receive_slot(connection: socket.socket) -> tuple[int, int]:
    data, fds, _, _ = socket.recv_fds(connection, 4, 1)
    if len(data) != 4 or len(fds) != 1:
        raise ProtocolError("no fd attached to MemoryFd")
    return struct.unpack("<I", data)[0], fds[0]


def hang(connection: socket.socket | None = None) -> None:
    """Do nothing until the peer hangs up; for ever where there is none."""
    if connection is None:
        time.sleep(FOREVER)
        return
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    raise ProtocolError("the peer lost its patience")


def wait_until_gone(path: str) -> None:
    """Wait until nobody listens any more."""
    while Path(path).exists():
        time.sleep(0.01)
    raise ProtocolError("the peer is gone")
