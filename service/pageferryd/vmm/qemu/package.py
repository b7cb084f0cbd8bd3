"""What crosses beside a QEMU guest's RAM: its device state, and RAM blocks that may be located at one end only."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from pageferry.errors import FerryError, Reason

_MAGIC = b"PFQEMU1\n"
_HEAD = struct.Struct(">8sII")
_ENTRY = struct.Struct(">HII32s")
MAX_BLOBS = 64
MAX_BLOB_BYTES = 16 << 20


class Blob(NamedTuple):
    """A small RAM block of `length` bytes, mostly zeroes at its end: what comes before them, packed.

    `digest` is the SHA-256 of that, so that who has the same needs to unpack nothing.
    """

    length: int
    digest: bytes
    packed: bytes


class Package(NamedTuple):
    """A device state, and small RAM blocks by name."""

    state: bytes
    blobs: Mapping[str, Blob]


def without_zeroes(content: bytes | bytearray) -> bytes:
    """Return a RAM block's content up to the zeroes that it ends with."""
    return bytes(content.rstrip(b"\0"))


def digest_of(filled: bytes) -> bytes:
    """Return the digest of a RAM block's content, which has no zeroes at its end."""
    return hashlib.sha256(filled).digest()


def pack_blob(content: bytes | bytearray) -> Blob:
    """Return a RAM block's content as it crosses. Some ms: not while the guest stands, if it can be."""
    filled = without_zeroes(content)
    return Blob(len(content), digest_of(filled), zlib.compress(filled, 1))


def unpack_blob(name: str, blob: Blob) -> bytes:
    """Return the content without the zeroes at its end. FerryError(VMM_FAILED) where it is damaged."""
    inflater = zlib.decompressobj()
    try:
        filled = inflater.decompress(blob.packed, blob.length + 1)
    except zlib.error as error:
        raise _spoilt(name) from error
    if len(filled) > blob.length or not inflater.eof or digest_of(filled) != blob.digest:
        raise _spoilt(name)
    return filled


def pack(package: Package) -> bytes:
    """Return it as bytes."""
    parts = [_HEAD.pack(_MAGIC, len(package.blobs), len(package.state))]
    for name, blob in package.blobs.items():
        encoded = name.encode()
        parts += [_ENTRY.pack(len(encoded), blob.length, len(blob.packed), blob.digest), encoded, blob.packed]
    return b"".join([*parts, package.state])


def unpack(data: bytes) -> Package:
    """Read one; its blobs are not unpacked. FerryError(VMM_FAILED) where it is none, or would be larger than it may."""
    try:
        magic, count, size = _HEAD.unpack_from(data)
        if magic != _MAGIC or count > MAX_BLOBS:
            raise ValueError("it begins otherwise")
        at = _HEAD.size
        blobs: dict[str, Blob] = {}
        for _ in range(count):
            at = _take_blob(data, at, blobs)
        if len(data) != at + size:
            raise ValueError(f"it has {len(data)} bytes where {at + size} were announced")
    except (struct.error, ValueError) as error:
        raise FerryError(Reason.VMM_FAILED, f"what came is no state of a QEMU guest: {error}") from error
    return Package(data[at:], blobs)


def _take_blob(data: bytes, at: int, blobs: dict[str, Blob]) -> int:
    name_bytes, length, packed_bytes, digest = _ENTRY.unpack_from(data, at)
    name_end = at + _ENTRY.size + name_bytes
    end = name_end + packed_bytes
    name = data[at + _ENTRY.size : name_end].decode()
    if length > MAX_BLOB_BYTES or name in blobs or end > len(data):
        raise ValueError(f"the RAM block {name!r} is twice in it, too large, or not whole")
    blobs[name] = Blob(length, digest, data[name_end:end])
    return int(end)


def _spoilt(name: str) -> FerryError:
    return FerryError(Reason.VMM_FAILED, f"RAM block {name} was damaged on its way: its digest differs")
