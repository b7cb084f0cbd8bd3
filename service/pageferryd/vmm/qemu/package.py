"""What crosses beside a QEMU guest's RAM: its device state, and RAM blocks that may be located at one end only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from pageferry.errors import FerryError, Reason

_MAGIC = b"PFQEMU1\n"
_HEAD = struct.Struct(">8sII")
_ENTRY = struct.Struct(">HII")
MAX_BLOBS = 64
MAX_BLOB_BYTES = 16 << 20


class Package(NamedTuple):
    """A device state, and the content of small RAM blocks by name."""

    state: bytes
    blobs: Mapping[str, bytes]


def pack(package: Package) -> bytes:
    """Return it as bytes."""
    parts = [_HEAD.pack(_MAGIC, len(package.blobs), len(package.state))]
    for name, content in package.blobs.items():
        # Mostly zeroes at the end, and the guest stands still meanwhile.
        packed, encoded = zlib.compress(content.rstrip(b"\0"), 1), name.encode()
        parts += [_ENTRY.pack(len(encoded), len(content), len(packed)), encoded, packed]
    return b"".join([*parts, package.state])


def unpack(data: bytes) -> Package:
    """Read one. FerryError(VMM_FAILED) where it is none, or would be larger than it may."""
    try:
        magic, count, size = _HEAD.unpack_from(data)
        if magic != _MAGIC or count > MAX_BLOBS:
            raise ValueError("it begins otherwise")
        at = _HEAD.size
        blobs: dict[str, bytes] = {}
        for _ in range(count):
            at = _take_blob(data, at, blobs)
        if len(data) != at + size:
            raise ValueError(f"it has {len(data)} bytes where {at + size} were announced")
    except (struct.error, ValueError, zlib.error) as error:
        raise FerryError(Reason.VMM_FAILED, f"what came is no state of a QEMU guest: {error}") from error
    return Package(data[at:], blobs)


def _take_blob(data: bytes, at: int, blobs: dict[str, bytes]) -> int:
    name_bytes, length, packed = _ENTRY.unpack_from(data, at)
    at += _ENTRY.size
    name = data[at : at + name_bytes].decode()
    at += name_bytes
    if length > MAX_BLOB_BYTES or name in blobs:
        raise ValueError(f"the RAM block {name!r} is twice in it, or too large")
    inflater = zlib.decompressobj()
    content = inflater.decompress(data[at : at + packed], length + 1)
    if len(content) > length or not inflater.eof:
        raise ValueError(f"the RAM block {name!r} is not whole")
    blobs[name] = content.ljust(length, b"\0")
    return at + int(packed)
