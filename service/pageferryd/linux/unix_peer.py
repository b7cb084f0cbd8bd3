"""Who is at the other end of a Unix socket, and file descriptors that come through it: unix(7), cmsg(3)."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import NamedTuple

from pageferry.errors import FerryError, Reason

_UCRED = struct.Struct("=iII")
_FD_SIZE = 4


class PeerCredentials(NamedTuple):
    """struct ucred: ids of the process at the time of its connect(2) or listen(2)."""

    pid: int
    uid: int
    gid: int


class Received(NamedTuple):
    """One message: its bytes, the file descriptors (the receiver owns them), and whether any part was cut off."""

    data: bytes
    fds: list[int]
    truncated: bool


def peer_credentials(connected: socket.socket) -> PeerCredentials:
    """Return who is at the other end of a connected Unix socket, as the kernel noted it (SO_PEERCRED)."""
    return PeerCredentials(*_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def listener_pid(path: str, timeout: float) -> int:
    """Return the id of the process that listens at a Unix socket, by connecting to it and hanging up.

    `timeout` in seconds. FerryError(VMM_UNREACHABLE) where nobody answers. 0 where the listener's process is in a pid
    namespace that this one cannot see.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(timeout)
        try:
            probe.connect(path)
        except OSError as error:
            raise FerryError(
                Reason.VMM_UNREACHABLE, f"nobody listens at {path}: {error.strerror or error}; is the VMM running?"
            ) from error
        return peer_credentials(probe).pid


def recv_with_fds(connected: socket.socket, max_bytes: int, max_fds: int) -> Received:
    """Receive one message of at most `max_bytes` with at most `max_fds` file descriptors, close-on-exec.

    File descriptors beyond `max_fds` are closed. Raises what recvmsg(2) raises: BlockingIOError, TimeoutError, ….
    """
    data, ancillary, flags, _ = connected.recvmsg(
        max_bytes, socket.CMSG_SPACE(max_fds * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
    for surplus in fds[max_fds:]:
        os.close(surplus)
    truncated = bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)) or len(fds) > max_fds
    return Received(data, fds[:max_fds].tolist(), truncated)
