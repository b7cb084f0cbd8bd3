"""The keeper's end of $NOTIFY_SOCKET: datagrams, the descriptors with them, and who sent them (unix(7))."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.linux.notify_wire import MAX_DATAGRAM_BYTES

if TYPE_CHECKING:
    from pathlib import Path

_UCRED = struct.Struct("=iII")
_FD_SIZE = 4
_MAX_FDS = 253  # SCM_MAX_FD
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * _FD_SIZE) + socket.CMSG_SPACE(_UCRED.size)


class Datagram(NamedTuple):
    """One datagram. The receiver owns the descriptors. `whole` is False where any part was cut off."""

    data: bytes
    fds: list[int]
    pid: int
    whole: bool


class NotifySocket:
    """A socket that only this user's processes can send to, at a path that no keeper before had.

    A sidecar that outlived its keeper must not take the next keeper for its own: the descriptors that it stored would
    be closed there.
    """

    def __init__(self, directory: Path) -> None:
        """Listen in `directory`. Raises OSError."""
        self.path = directory / f"keeper-{os.urandom(4).hex()}.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind(str(self.path))
        except BaseException:
            self._socket.close()
            raise
        finally:
            os.umask(before)

    def fileno(self) -> int:
        """Return the socket's descriptor, for epoll."""
        return self._socket.fileno()

    def receive(self) -> Datagram | None:
        """Return the next datagram, None where there is none now. Raises OSError."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(MAX_DATAGRAM_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        fds = array.array("i")
        pid = 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(content) == _UCRED.size:
                pid = _UCRED.unpack(content)[0]
        return Datagram(data, fds.tolist(), pid, not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


def clear_away(directory: Path) -> str:
    """Remove the sockets of keepers that were killed; return the path of one that still listens, "" for none."""
    for path in directory.glob("keeper-*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            else:
                return str(path)
    return ""
