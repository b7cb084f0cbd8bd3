"""The files of a snapshot as Firecracker frames them: magic, version string, state, CRC-64; and the memory, flat."""

from __future__ import annotations

import os
import struct

from firecracker_vmm.memory import PAGE, FirecrackerMemory
from pageferryd.vmm.firecracker.state_file import CRC_BYTES, crc64

MAGIC = 0x0710_1984_8664_0000
VERSION = b"7.0.0"
_HEAD = struct.Struct("<QQ")
_LENGTH = struct.Struct("<Q")


class SnapshotError(Exception):
    """What Firecracker puts into a fault message."""


def framed(state: bytes) -> bytes:
    body = _HEAD.pack(MAGIC, len(VERSION)) + VERSION + _LENGTH.pack(len(state)) + state
    return body + crc64(body).to_bytes(CRC_BYTES, "little")


def write_state(path: str, content: bytes) -> None:
    _write(path, "snapshot", lambda fd: os.write(fd, content), os.O_TRUNC)


def write_memory(path: str, memory: FirecrackerMemory) -> None:
    def dump(fd: int) -> None:
        os.ftruncate(fd, memory.size)
        for offset in range(0, memory.size, PAGE):
            os.pwrite(fd, memory.read(offset, PAGE), offset)

    _write(path, "memory", dump, 0)


def _write(path: str, what: str, fill, more: int) -> None:  # noqa: ANN001
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | more, 0o644)
    except OSError as error:
        raise SnapshotError(
            f"Cannot perform open on the {what} backing file: {error.strerror} (os error {error.errno})"
        ) from error
    try:
        fill(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_state(path: str) -> bytes:
    """Return the state of a file, after the checks that Firecracker makes."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read(10_000_001)
    except OSError as error:
        raise SnapshotError(f"Failed to open snapshot file: {error.strerror} (os error {error.errno})") from error
    if len(content) <= _HEAD.size + CRC_BYTES or crc64(content):
        raise SnapshotError("Failed to load snapshot state from file: CRC64 validation failed")
    magic, length = _HEAD.unpack_from(content)
    at = _HEAD.size + length
    if magic != MAGIC:
        raise SnapshotError(f"Failed to load snapshot state from file: Magic value does not match arch: {magic}")
    if content[_HEAD.size : at] != VERSION:
        raise SnapshotError("Failed to load snapshot state from file: Invalid data version")
    (size,) = _LENGTH.unpack_from(content, at)
    at += _LENGTH.size
    return content[at : at + size]
