"""The file of a microVM's state: taken from a directory that the VMM owns, and put into one.

Firecracker closes the file with a CRC-64 of all before it (src/vmm/src/snapshot/): the polynomial of Jones, reflected,
from 0 on and unchanged at the end, little-endian.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Final

MAX_STATE_BYTES: Final = 64 << 20
CRC_BYTES: Final = 8

_POLYNOMIAL: Final = 0x95AC9329AC4BC9B5


def _step(register: int) -> int:
    for _ in range(8):
        register = register >> 1 ^ (_POLYNOMIAL if register & 1 else 0)
    return register


_TABLE: Final = tuple(_step(byte) for byte in range(256))


def crc64(data: bytes) -> int:
    """Return the checksum of some bytes; that of bytes with their own checksum behind them is 0."""
    register = 0
    table = _TABLE
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register


def is_complete(state: bytes) -> bool:
    """Say whether a state ends with its checksum."""
    return len(state) > CRC_BYTES and crc64(state) == 0


def take(path: Path) -> bytes:
    """Return what a VMM wrote to a file, or nothing where there is none. FerryError(VMM_FAILED) for a trick.

    The directory is the VMM's: what lies there may be a link to something that is not.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FerryError(Reason.VMM_FAILED, f"the VMM's state file cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != path.parent.stat().st_uid:
            raise FerryError(Reason.VMM_FAILED, "the VMM's state file is no file of its own")
        return _all_of(file.fileno())


def _all_of(fd: int) -> bytes:
    state = bytearray()
    while len(state) <= MAX_STATE_BYTES:
        part = os.read(fd, 1 << 20)
        if not part:
            return bytes(state)
        state += part
    raise FerryError(Reason.VMM_FAILED, f"the VMM's state is longer than {MAX_STATE_BYTES} bytes")


def put(path: Path, state: bytes) -> None:
    """Write a state where the VMM can read it. FerryError: NO_SPACE, PERMISSION_MISSING."""
    try:
        # Made by nobody else before: the directory is the VMM's.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o444)
            file.write(state)
    except FileExistsError as error:
        raise FerryError(Reason.VMM_FAILED, f"something is in the way of the guest's state at {path}") from error
    except PermissionError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING, f"cannot write the guest's state to {path}: {error.strerror}"
        ) from error
    except OSError as error:
        raise FerryError(Reason.NO_SPACE, f"cannot write the guest's state to {path}: {error.strerror}") from error
