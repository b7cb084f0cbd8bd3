"""A guest's memory at its destination: taken over from the VMM, filled, and let go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.destination.handoff import Handoff, HandoffListener
from pageferryd.destination.session import Session
from pageferryd.destination.uffd_door import UffdDoor
from pageferryd.destination.uffd_installer import UffdInstaller
from pageferryd.linux.pidfd import PidFd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pageferryd.core.layout import Layout
    from pageferryd.destination.lanes import LaneOpener
    from pageferryd.destination.session import SessionOptions
    from pageferryd.vmm.driver import VmmDriver


class VmmWatch:
    """Calls back once when a process has ended."""

    def __init__(self, pid: int, ended: Callable[[], None]) -> None:
        """FerryError(VMM_GONE) where it has ended already."""
        self._process: PidFd | None = PidFd(pid)
        self._ended = ended
        asyncio.get_running_loop().add_reader(self._process.fileno(), self._exited)

    def _exited(self) -> None:
        self.close()
        self._ended()

    def close(self) -> None:
        """Stop watching. Twice does nothing."""
        process, self._process = self._process, None
        if process is not None:
            asyncio.get_running_loop().remove_reader(process.fileno())
            process.close()


class Arrival:
    """A waiting VMM's memory, and the session that fills it."""

    def __init__(self, handoff: Handoff, session: Session, installer: UffdInstaller) -> None:
        self.session = session
        self._handoff = handoff
        self._installer = installer
        self._watch: VmmWatch | None = None

    @classmethod
    async def take_over(
        cls,
        driver: VmmDriver,
        layout: Layout,
        pid: int,
        socket_path: Path,
        seconds: float,
        opener: LaneOpener,
        options: SessionOptions,
        paused: Callable[[FerryError | None], None],
    ) -> Arrival:
        """Open the lanes, then have the VMM hand its memory over. FerryError: HANDOFF_* or of the lanes."""
        lanes = await opener.open()
        try:
            handoff = await _hand_off(driver, HandoffListener(socket_path, layout, pid), seconds)
        except BaseException:
            await lanes.close()
            raise
        installer = UffdInstaller(handoff.uffd, handoff.addresses)
        door = UffdDoor(handoff.uffd, handoff.addresses)
        session = Session(layout, [door], installer, opener, options, paused, lanes)
        arrival = cls(handoff, session, installer)
        try:
            arrival._watch = VmmWatch(pid, lambda: session.fail(_gone(pid)))
        except BaseException:
            # The guest has never run: nobody can read what is missing.
            await arrival.abandon()
            raise
        return arrival

    async def let_go(self) -> None:
        """Every page is in: the guest needs the sidecar no longer."""
        await self._stop()
        self._installer.release()
        self._handoff.connection.close()

    async def abandon(self) -> None:
        """The VMM has ended, or was never to run: its memory is nobody's."""
        await self._stop()
        self._handoff.close()

    async def hold(self) -> None:
        """Stop, and keep the guest's memory guarded: who touches a missing page waits, and reads no zeroes."""
        await self._stop()

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
        await self.session.close()


async def _hand_off(driver: VmmDriver, listener: HandoffListener, seconds: float) -> Handoff:
    """Ask the VMM to connect, and receive; whichever fails first tells why."""
    receiving = asyncio.create_task(listener.receive(seconds))
    asking = asyncio.create_task(driver.attach_pager(str(listener.path)))
    try:
        await asyncio.wait({receiving, asking}, return_when=asyncio.FIRST_EXCEPTION)
        if receiving.done() and not asking.done():
            receiving.result()
        await asking
        return await receiving
    except BaseException:
        if receiving.done() and not receiving.cancelled() and receiving.exception() is None:
            receiving.result().close()
        raise
    finally:
        for task in (receiving, asking):
            task.cancel()
        await asyncio.gather(receiving, asking, return_exceptions=True)
        listener.close()


def _gone(pid: int) -> FerryError:
    return FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) ended while its guest's memory was coming")
