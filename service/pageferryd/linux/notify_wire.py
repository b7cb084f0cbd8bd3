"""The datagrams between a service and its manager: sd_notify(3), sd_pid_notify_with_fds(3), sd_notify_barrier(3).

Both ends use this file: the sidecar, and the keeper, which must stay small. Hence it imports nothing of ours.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

FIRST_FD = 3  # SD_LISTEN_FDS_START
MAX_NAME_BYTES = 255  # FDNAME_MAX of systemd (src/basic/fd-util.h)
MAX_DATAGRAM_BYTES = 4096  # NOTIFY_BUFFER_MAX of systemd (PIPE_BUF)
MAX_NAMES_BYTES = (128 << 10) - 64
"""All names in $LISTEN_FDNAMES: execve(2) takes strings of up to 128 KiB, and a longer one would end every start."""
DEFAULT_NAME = "stored"

READY = b"READY=1"
STOPPING = b"STOPPING=1"
BARRIER = b"BARRIER=1"
_STORE = b"FDSTORE=1"
_REMOVE = b"FDSTOREREMOVE=1"
_NAME = b"FDNAME="
_NO_POLL = b"FDPOLL=0"


class Action(Enum):
    """What a datagram asks of the store."""

    NOTHING = "nothing"
    STORE = "store"
    REMOVE = "remove"
    BARRIER = "barrier"


class Notice(NamedTuple):
    """One datagram, understood. `poll`: a stored descriptor is let go once it hangs up or fails."""

    action: Action
    name: str
    poll: bool
    ready: bool
    stopping: bool


def is_name(name: str) -> bool:
    """Whether a descriptor may be stored under a name: 1 to 255 printable ASCII characters, no colon."""
    return 0 < len(name) <= MAX_NAME_BYTES and name.isascii() and name.isprintable() and ":" not in name


def store(name: str) -> bytes:
    """Return the datagram that stores the descriptors which come with it, whatever becomes of their other ends."""
    return b"\n".join((_STORE, _NAME + name.encode("ascii"), _NO_POLL))


def remove(name: str) -> bytes:
    """Return the datagram that removes all descriptors of a name."""
    return b"\n".join((_REMOVE, _NAME + name.encode("ascii")))


def names_bytes(names: int, characters: int) -> int:
    """Return how long $LISTEN_FDNAMES is with so many names of so many characters in all."""
    return characters + max(0, names - 1)


def parse(data: bytes) -> Notice | None:
    """Return what a datagram says, None where it is to be ignored as systemd ignores it. Never raises."""
    if not data or len(data) > MAX_DATAGRAM_BYTES or b"\0" in data:
        return None
    lines = [line for line in data.split(b"\n") if line]
    if BARRIER in lines:
        return Notice(Action.BARRIER, "", poll=False, ready=False, stopping=False) if len(lines) == 1 else None
    name = next((line[len(_NAME) :] for line in lines if line.startswith(_NAME)), b"").decode("ascii", "replace")
    action = Action.NOTHING
    if _REMOVE in lines:
        if not is_name(name):
            return None
        action = Action.REMOVE
    elif _STORE in lines:
        action = Action.STORE
        name = name if is_name(name) else DEFAULT_NAME
    return Notice(action, name, poll=_NO_POLL not in lines, ready=READY in lines, stopping=STOPPING in lines)
