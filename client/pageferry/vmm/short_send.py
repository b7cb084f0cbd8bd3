"""Send a few bytes on a socket without letting go of the GIL.

`socket.send` lets go of it, and a thread that wants it is woken for these few microseconds; then both go to sleep and
are woken once more each. Where many threads send short messages these switches cost more than all else.
"""

from __future__ import annotations

import ctypes
import socket

# PyDLL keeps the GIL.
_send = ctypes.PyDLL(None).send
_send.restype = ctypes.c_ssize_t
_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def send_short(connection: socket.socket, data: bytes) -> None:
    """Send all of `data`; wait, without the GIL, only where the other end leaves no room for it. OSError as usual."""
    sent = max(_send(connection.fileno(), data, len(data), _FLAGS), 0)
    if sent < len(data):
        # It knows why, or waits.
        connection.sendall(data[sent:])
