"""Frames of a lane on a bare socket: LaneHello of proto/pageferry/v1/page.proto says what they are."""

from __future__ import annotations

import struct
from typing import Final

from pageferryd.core.errors import MalformedPagesError

HEAD: Final = struct.Struct("<I")
HEAD_SIZE: Final = HEAD.size
REFUSAL: Final = 1 << 31
MAX_REQUEST: Final = 64 << 10
"""Longest frame that a source takes: a push request of 256 runs has 3 KiB."""
MAX_ANSWER: Final = 4 << 20
"""Longest frame that a destination takes: an answer of 512 pages has 2 MiB and its columns."""


class RequestFrames:
    """Cuts what a source receives into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, data: bytes) -> list[bytes]:
        """Return the frames that are whole now. MalformedPagesError for one that is too long."""
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        at, end = 0, len(buffer)
        while end - at >= HEAD_SIZE:
            (size,) = HEAD.unpack_from(buffer, at)
            if size > MAX_REQUEST:
                raise MalformedPagesError(f"a frame of {size} bytes came; {MAX_REQUEST} are allowed")
            if end - at < HEAD_SIZE + size:
                break
            at += HEAD_SIZE
            frames.append(bytes(buffer[at : at + size]))
            at += size
        del buffer[:at]
        return frames


def framed(message: bytes) -> bytes:
    """Return a message as a frame."""
    return HEAD.pack(len(message)) + message


def refusal(status: bytes) -> bytes:
    """Return a google.rpc.Status as a frame that refuses."""
    return HEAD.pack(len(status) | REFUSAL) + status
