"""The destination's notes: what a sidecar that starts again knows of the ones before it."""

from __future__ import annotations

import struct

_RECORD = struct.Struct("<QQ")


class Journal:
    """Pages that the guest gave away, as records in a file that is only ever appended to, and whether all had come."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.whole = False

    def note(self, first: int, pages: int, written: int = _RECORD.size) -> None:
        """Append a record; of one that is cut off by the sidecar's end only some bytes are `written`."""
        self.content += _RECORD.pack(first, pages)[:written]

    def open(self) -> list[tuple[int, int]]:
        """Return the records, and cut off a torn one: what is appended to it could never be read."""
        del self.content[len(self.content) - len(self.content) % _RECORD.size :]
        return list(_RECORD.iter_unpack(self.content))
