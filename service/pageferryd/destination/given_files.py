"""Memory files that a driver gave its VMM, and the connection at which that asks for their pages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.files_installer import FilesInstaller
from pageferryd.destination.offload_door import OffloadDoor
from pageferryd.linux.memory_file import MemoryFile

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence

    from pageferryd.destination.door import FaultDoor
    from pageferryd.destination.installer import Installer


class GivenMemory:
    """See HandedOver."""

    connection: socket.socket | None = None
    """None: the VMM asks in a protocol of its own, which is a door's."""

    def __init__(self, layout: Layout, files: Sequence[tuple[int, int]], connection: socket.socket) -> None:
        """Own descriptors and connection; FerryError(HANDOFF_*) where they do not fit, and they are closed."""
        self._asking = connection
        # Written in 4 KiB pages, whatever lies beneath them.
        self.layout = Layout([Region(region.guest_address, region.size) for region in layout.regions])
        owned: dict[int, MemoryFile] = {}
        unowned = dict.fromkeys(fd for fd, _ in files)
        try:
            sizes = _sizes(layout, files)
            for fd, size in sizes.items():
                owned[fd] = MemoryFile(fd, size)
                del unowned[fd]
        except BaseException:
            connection.close()
            for file in owned.values():
                file.close()
            for fd in unowned:
                os.close(fd)
            raise
        self._installer = FilesInstaller(self.layout, [(owned[fd], offset) for fd, offset in files])
        self._door = OffloadDoor(self.layout, connection, self._installer.make_present)

    def installer(self) -> Installer:
        """Return what writes into the files."""
        return self._installer

    def doors(self) -> tuple[ExitDoor, Sequence[FaultDoor]]:
        """Return the exit door, and the door at which the VMM asks beside it."""
        exit_door = ExitDoor(self.layout)
        return exit_door, [self._door, exit_door]

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield nothing: where the VMM has mapped its memory is its own affair."""
        return iter(())

    @property
    def guarded_addresses(self) -> Sequence[int]:
        """None: the VMM has a userfaultfd of its own."""
        return ()

    @property
    def kept(self) -> Mapping[str, int]:
        """None: what the VMM has asked and was not answered is lost with the process that it asked."""
        return {}

    async def in_place(self, pid: int) -> Sequence[tuple[int, int]]:
        """None that a later sidecar could know of."""
        return ()

    async def finished(self) -> None:
        """Wait until the VMM has hung up: it asks for every page, also for those that are there already."""
        await self._door.finished()

    def let_go(self) -> None:
        """Close the connection."""
        self._asking.close()

    def close(self) -> None:
        """Let all of it go."""
        self._door.close()
        self._installer.abandon()
        self.let_go()


def _sizes(layout: Layout, files: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return how many bytes of each descriptor hold regions."""
    if len(files) != len(layout.regions):
        raise FerryError(
            Reason.HANDOFF_REGIONS, f"{len(files)} memory files for {len(layout.regions)} regions of the guest"
        )
    sizes: dict[int, int] = {}
    for (fd, offset), region in zip(files, layout.regions, strict=True):
        if offset < 0 or offset % PAGE_SIZE:
            raise FerryError(
                Reason.HANDOFF_REGIONS,
                f"the region at {region.guest_address:#x} begins at {offset} of its memory file: that is no page",
            )
        sizes[fd] = max(sizes.get(fd, 0), offset + region.size)
    return sizes
