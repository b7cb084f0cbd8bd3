"""Hand memory and its region table to a pager, on the wire that Firecracker uses (docs/handoff.md).

One sendmsg on a Unix stream socket: a JSON array with one object a region, and descriptors as SCM_RIGHTS. Those are a
userfaultfd; or a userfaultfd, the memory itself and its userfault bitmap; or the latter two alone. Nothing comes back;
the socket stays open until the guest no longer needs the pager.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pageferry.vmm.bitmap import UserfaultBitmap
    from pageferry.vmm.faults import FaultForwarder
    from pageferry.vmm.guest_memfd import GuestMemfd
    from pageferry.vmm.memory import GuestMemory

HANDOFF_SECONDS = 10.0


@dataclass(frozen=True)
class HandoffRegion:
    """One region of the table; all in bytes.

    `offset` is where the region begins in the flat space of all regions, the running sum of their sizes, and in the
    memory's descriptor where one is handed over. Then `gpa_start` is needed too, its guest-physical address:
    vCPUs' faults name pages by it.
    """

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int = 4096
    gpa_start: int | None = None
    is_guest_memfd: bool = False


def encode_table(regions: Sequence[HandoffRegion]) -> bytes:
    """Return the JSON of the table. `page_size_kib` is in bytes too: some Firecracker releases send only that key."""
    return json.dumps([_entry(one) for one in regions], separators=(",", ":")).encode()


def _entry(region: HandoffRegion) -> dict[str, int | bool]:
    entry: dict[str, int | bool] = {
        "base_host_virt_addr": region.base_host_virt_addr,
        "size": region.size,
        "offset": region.offset,
        "page_size": region.page_size,
        "page_size_kib": region.page_size,
    }
    if region.gpa_start is not None:
        entry |= {"gpa_start": region.gpa_start, "is_guest_memfd": region.is_guest_memfd}
    return entry


def send_handoff(
    socket_path: str,
    descriptors: int | Sequence[int],
    regions: Sequence[HandoffRegion],
    timeout: float = HANDOFF_SECONDS,
) -> socket.socket:
    """Connect to the pager at `socket_path` and hand `descriptors` over; return the socket, to be kept open.

    One descriptor is a userfaultfd; three are a userfaultfd, the memory of all regions and its userfault bitmap; two
    are the same without a userfaultfd.

    Blocks for at most `timeout` seconds in connecting and as long again in sending. FerryError: HANDOFF_TIMEOUT when
    the pager does not take it in time, HANDOFF_REGIONS when there is no region, VMM_FAILED when it cannot be reached.
    """
    if not regions:
        raise FerryError(Reason.HANDOFF_REGIONS, "there is no region to hand over: the guest has no memory")
    fds = [descriptors] if isinstance(descriptors, int) else list(descriptors)
    if len(fds) > 1 and any(one.gpa_start is None for one in regions):
        raise FerryError(Reason.HANDOFF_REGIONS, "memory is handed over without the guest address of each region")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The kernel bounds connect and sendmsg alike: settimeout would make a full backlog fail at once (connect(2)).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
        connection.connect(socket_path)
        _send(connection, encode_table(regions), fds)
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


def _send(connection: socket.socket, table: bytes, fds: list[int]) -> None:
    sent = connection.sendmsg([table], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    if sent < len(table):
        raise BlockingIOError(f"only {sent} of {len(table)} bytes of the table were taken")


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))


class PagerLink:
    """What an incoming VMM holds while a pager serves it: the socket, and its own copy of the userfaultfd if any."""

    def __init__(self, uffd: int | None, connection: socket.socket, regions: Sequence[HandoffRegion] = ()) -> None:
        self._uffd = uffd
        self._connection = connection
        self._regions = regions

    @classmethod
    def open(
        cls,
        socket_path: str,
        memory: GuestMemory,
        *,
        bitmap: UserfaultBitmap | None = None,
        guest_address: int = 0,
        user_mode_only: bool = False,
        timeout: float = HANDOFF_SECONDS,
    ) -> PagerLink:
        """Put all of `memory`, fresh and untouched, under a userfaultfd and hand it to the pager at `socket_path`.

        With `bitmap`, vCPUs' faults come by exits as well: the memfd of `memory`, which begins at `guest_address`, and
        the bitmap go along. Blocks as `send_handoff` does. After an error the memory is as before, and may be handed
        over again.
        """
        regions = memory.handoff_regions(None if bitmap is None else guest_address)
        if bitmap is not None and memory.memfd < 0:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{memory.backing} memory has no memfd to hand over: use shmem")
        uffd = memory.open_userfault(user_mode_only=user_mode_only, minor=bitmap is not None)
        try:
            descriptors = [uffd] if bitmap is None else [uffd, memory.memfd, bitmap.memfd]
            connection = send_handoff(socket_path, descriptors, regions, timeout)
        except BaseException:
            memory.release_userfault(uffd)
            raise
        return cls(uffd, connection, regions)

    @classmethod
    def open_without_userfault(
        cls,
        socket_path: str,
        memory: GuestMemfd,
        bitmap: UserfaultBitmap,
        *,
        guest_address: int = 0,
        timeout: float = HANDOFF_SECONDS,
    ) -> PagerLink:
        """Hand `memory`, fresh and untouched, and its `bitmap` with all bits set to the pager at `socket_path`.

        For memory that no userfaultfd can watch: the VMM forwards each fault (FaultForwarder). Blocks as
        `send_handoff` does; may be tried again after an error.
        """
        regions = memory.handoff_regions(guest_address)
        return cls(None, send_handoff(socket_path, [memory.memfd, bitmap.memfd], regions, timeout), regions)

    def forward_through(self, forwarder: FaultForwarder) -> None:
        """Let `forwarder` send faults over this link's connection where it can, which takes the least time.

        Close the forwarder before this.
        """
        forwarder.use_handoff(self._connection, self._regions)

    def close(self) -> None:
        """Let both go: only after the pager said that every page is installed. A second call does nothing."""
        if self._uffd is not None:
            os.close(self._uffd)
            self._uffd = None
        # A thread that still waits for an answer would not notice the close alone.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
