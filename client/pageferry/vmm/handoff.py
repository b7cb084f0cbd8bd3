"""Hand a userfaultfd and its region table to a pager, on the wire that Firecracker uses (docs/handoff.md).

One sendmsg on a Unix stream socket: a JSON array with one object a region, and the descriptor as SCM_RIGHTS. Nothing
comes back; the socket stays open until the guest no longer needs the pager.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pageferry.vmm.memory import GuestMemory

HANDOFF_SECONDS = 10.0


@dataclass(frozen=True)
class HandoffRegion:
    """One region of the table; all in bytes.

    `offset` is where the region begins in the flat space of all regions, the running sum of their sizes: that is how
    the pager recognises it, since no guest-physical address is sent.
    """

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int = 4096


def encode_table(regions: Sequence[HandoffRegion]) -> bytes:
    """Return the JSON of the table. `page_size_kib` is in bytes too: some Firecracker releases send only that key."""
    table = [
        {
            "base_host_virt_addr": one.base_host_virt_addr,
            "size": one.size,
            "offset": one.offset,
            "page_size": one.page_size,
            "page_size_kib": one.page_size,
        }
        for one in regions
    ]
    return json.dumps(table, separators=(",", ":")).encode()


def send_handoff(
    socket_path: str, uffd: int, regions: Sequence[HandoffRegion], timeout: float = HANDOFF_SECONDS
) -> socket.socket:
    """Connect to the pager at `socket_path` and hand `uffd` over; return the socket, to be kept open.

    Blocks for at most `timeout` seconds in connecting and as long again in sending. FerryError: HANDOFF_TIMEOUT when
    the pager does not take it in time, HANDOFF_REGIONS when there is no region, VMM_FAILED when it cannot be reached.
    """
    if not regions:
        raise FerryError(Reason.HANDOFF_REGIONS, "there is no region to hand over: the guest has no memory")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The kernel bounds connect and sendmsg alike: settimeout would make a full backlog fail at once (connect(2)).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
        connection.connect(socket_path)
        _send(connection, encode_table(regions), uffd)
    except BlockingIOError as error:
        connection.close()
        raise FerryError(
            Reason.HANDOFF_TIMEOUT, f"the pager at {socket_path} did not take the hand-off within {timeout:g} s"
        ) from error
    except OSError as error:
        connection.close()
        raise FerryError(
            Reason.VMM_FAILED, f"cannot hand memory over to the pager at {socket_path}: {error}"
        ) from error
    return connection


def _send(connection: socket.socket, table: bytes, uffd: int) -> None:
    sent = connection.sendmsg([table], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))])
    if sent < len(table):
        raise BlockingIOError(f"only {sent} of {len(table)} bytes of the table were taken")


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))


class PagerLink:
    """What an incoming VMM holds while a pager serves it: its own copy of the userfaultfd, and the socket."""

    def __init__(self, uffd: int, connection: socket.socket) -> None:
        self._uffd = uffd
        self._connection = connection

    @classmethod
    def open(
        cls, socket_path: str, memory: GuestMemory, *, user_mode_only: bool = False, timeout: float = HANDOFF_SECONDS
    ) -> PagerLink:
        """Put all of `memory`, fresh and untouched, under a userfaultfd and hand it to the pager at `socket_path`.

        Blocks as `send_handoff` does. After an error the memory is as before, and may be handed over again.
        """
        uffd = memory.open_userfault(user_mode_only=user_mode_only)
        try:
            connection = send_handoff(socket_path, uffd, memory.handoff_regions(), timeout)
        except BaseException:
            memory.release_userfault(uffd)
            raise
        return cls(uffd, connection)

    def close(self) -> None:
        """Let both go: only after the pager said that every page is installed. A second call does nothing."""
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1
            self._connection.close()
