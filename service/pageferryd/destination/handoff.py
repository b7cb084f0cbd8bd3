"""The hand-off: a waiting VMM gives its userfaultfd and region table to this host's sidecar (docs/handoff.md).

The wire is Firecracker's: one sendmsg of a JSON array, one object a region, with the userfaultfd as SCM_RIGHTS
(src/vmm/src/persist.rs there). Nothing that comes over it is trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pageferry.errors import FerryError, Reason
from pageferryd.core.refusals import HANDOFF
from pageferryd.destination.address_map import AddressMap
from pageferryd.destination.handed_over import MAX_FDS, Handoff, assemble
from pageferryd.destination.own_memory import refuse_foreign_memory
from pageferryd.linux.unix_peer import peer_credentials, recv_with_fds
from pageferryd.linux.userfaultfd import is_userfaultfd
from pageferryd.linux.vmm_directory import give_to_owner_of_directory

if TYPE_CHECKING:
    from pageferryd.core.layout import Layout
    from pageferryd.core.refusals import Refusals

MAX_TABLE_BYTES = 1 << 20
_CHUNK = 64 << 10
_REFUSALS: Final = frozenset({
    Reason.HANDOFF_WRONG_PEER, Reason.HANDOFF_NO_FD, Reason.HANDOFF_MALFORMED, Reason.HANDOFF_REGIONS,
    Reason.MEMORY_NOT_ITS_OWN,
})  # fmt: skip


class HandoffListener:
    """A Unix socket for one hand-off from one process."""

    def __init__(self, path: Path, layout: Layout, pid: int, refusals: Refusals | None = None) -> None:
        """Listen at `path`, with mode 0600 and for the user of its directory, for process `pid`.

        `refusals` is where hand-offs that are refused are counted.
        """
        self.path = path
        self._layout = layout
        self._pid = pid
        self._refusals = refusals
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._listener.setblocking(False)
            path.unlink(missing_ok=True)
            bind_private(self._listener, path)
            self._listener.listen(1)
        except OSError as error:
            self.close()
            reason = Reason.NO_SPACE if error.errno == errno.ENOSPC else Reason.PERMISSION_MISSING
            raise FerryError(reason, f"cannot listen for the VMM's hand-off at {path}: {error}") from error

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
        self.path.unlink(missing_ok=True)

    async def receive(self, seconds: float) -> Handoff:
        """Wait for the hand-off.

        FerryError: HANDOFF_TIMEOUT, _WRONG_PEER, _NO_FD, _MALFORMED or _REGIONS; MEMORY_NOT_ITS_OWN where it is not
        the VMM's own memory, and what keeps this process from looking: PERMISSION_MISSING, VMM_GONE.
        """
        try:
            async with asyncio.timeout(seconds):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
                return await self._take(connection)
        except TimeoutError as error:
            raise FerryError(
                Reason.HANDOFF_TIMEOUT,
                f"the VMM (process {self._pid}) has not handed its memory over within {seconds:g} s",
            ) from error

    async def _take(self, connection: socket.socket) -> Handoff:
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            connection.setblocking(False)
            peer = peer_credentials(connection)
            try:
                if peer.pid != self._pid or not peer.pid:
                    raise FerryError(
                        Reason.HANDOFF_WRONG_PEER,
                        f"process {peer.pid} tried to hand memory over where process {self._pid} was expected",
                    )
                handoff = await self._receive(connection)
            except FerryError as error:
                if self._refusals is not None and error.reason in _REFUSALS:
                    who = f"process {peer.pid} of user {peer.uid}"
                    self._refusals.note(HANDOFF, error.reason, who, error.message)
                raise
            undo.pop_all()
            return handoff

    async def _receive(self, connection: socket.socket) -> Handoff:
        fds: list[int] = []
        with contextlib.ExitStack() as undo:
            undo.callback(_close_all, fds)
            table = await _receive_table(connection, fds)
            files = [fd for fd in fds if not is_userfaultfd(fd)]
            handoff = assemble(fds, read_table(table, self._layout), connection)
            undo.callback(handoff.close)
            await asyncio.to_thread(refuse_foreign_memory, handoff, files, self._pid)
            undo.pop_all()
            return handoff


def bind_private(listener: socket.socket, path: Path) -> None:
    """Bind a socket for the user whom its directory belongs to, and nobody else. Raises OSError."""
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    give_to_owner_of_directory(path)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _receive_table(connection: socket.socket, fds: list[int]) -> Any:
    """Return the JSON; descriptors are added to `fds`. The length is not sent: it ends where the JSON does."""
    data = bytearray()
    while True:
        await _readable(connection)
        received = recv_with_fds(connection, _CHUNK, MAX_FDS)
        fds += received.fds
        data += received.data
        if received.data and len(data) <= MAX_TABLE_BYTES and len(fds) <= MAX_FDS:
            if data.rstrip().endswith(b"]"):
                # Regions hold no arrays: this is the end of the table, if it is one.
                with contextlib.suppress(ValueError, RecursionError):
                    return json.loads(data)
            elif data.lstrip()[:1] == b"[" and not received.truncated:
                continue
        raise FerryError(Reason.HANDOFF_MALFORMED, f"the hand-off is no JSON table of regions ({len(data)} bytes came)")


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection.fileno())


def read_table(table: Any, layout: Layout) -> AddressMap:
    """Check a region table against the guest's layout. FerryError: HANDOFF_MALFORMED or HANDOFF_REGIONS."""
    if not isinstance(table, list) or not all(isinstance(entry, dict) for entry in table):
        raise FerryError(Reason.HANDOFF_MALFORMED, "the hand-off's table is no array of objects")
    if len(table) != len(layout.regions):
        raise FerryError(
            Reason.HANDOFF_REGIONS, f"the hand-off has {len(table)} regions where the guest has {len(layout.regions)}"
        )
    number = _number_in
    entries = sorted(table, key=lambda entry: number(entry, "offset"))
    offsets = [0, *accumulate(region.size for region in layout.regions)]
    for entry, region, offset in zip(entries, layout.regions, offsets, strict=False):
        found = number(entry, "offset"), number(entry, "size"), number(entry, "page_size", "page_size_kib")
        if "gpa_start" in entry and number(entry, "gpa_start") != region.guest_address:
            raise FerryError(
                Reason.HANDOFF_REGIONS,
                f"the hand-off has a region at guest address {entry['gpa_start']:#x} where the guest has one at "
                f"{region.guest_address:#x}",
            )
        if found != (offset, region.size, region.page_size):
            raise FerryError(
                Reason.HANDOFF_REGIONS,
                f"the hand-off has a region with (offset, size, page size) {found} where the guest has "
                f"{(offset, region.size, region.page_size)}",
            )
    return AddressMap(layout, [number(entry, "base_host_virt_addr") for entry in entries])


def _number_in(entry: dict[str, Any], *names: str) -> int:
    for name in names:
        value = entry.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
            return value
    raise FerryError(Reason.HANDOFF_MALFORMED, f"a region of the hand-off has no usable {' or '.join(names)}")
