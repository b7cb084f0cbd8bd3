"""Memory files that a driver gave its VMM, and the connection at which that asks for their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from pageferryd.core.layout import Layout
    from pageferryd.destination.door import FaultDoor
    from pageferryd.destination.exit_door import ExitDoor
    from pageferryd.destination.installer import Installer


class GivenMemory:
    """See HandedOver."""

    def __init__(self, layout: Layout, files: Sequence[tuple[int, int]], connection: socket.socket) -> None:
        """Own descriptors and connection; FerryError(HANDOFF_REGIONS) where they do not fit, and they are closed."""
        raise NotImplementedError

    layout: Layout
    connection: socket.socket | None

    def installer(self) -> Installer:
        raise NotImplementedError

    def doors(self) -> tuple[ExitDoor, Sequence[FaultDoor]]:
        raise NotImplementedError

    def spans(self) -> Iterator[tuple[int, int]]:
        raise NotImplementedError

    async def finished(self) -> None:
        raise NotImplementedError

    def let_go(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
