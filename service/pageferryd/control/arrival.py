"""A guest's memory at its destination: taken over from the VMM, filled, and let go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.control.faults import Faults
from pageferryd.destination.handoff import HandoffListener
from pageferryd.destination.session import Session
from pageferryd.linux.pidfd import PidFd

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.config import Settings
    from pageferryd.core.layout import Layout
    from pageferryd.destination.handed_over import Handoff
    from pageferryd.destination.installer import Installer
    from pageferryd.destination.lanes import LaneOpener, Lanes
    from pageferryd.destination.session import SessionOptions
    from pageferryd.vmm.driver import FaultEndpoint, VmmDriver


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


@dataclass(frozen=True)
class Waiting:
    """A VMM that waits for a guest: how to reach it, its memory, and its process."""

    driver: VmmDriver
    layout: Layout
    pid: int


class Arrival:
    """A waiting VMM's memory, and the session that fills it."""

    def __init__(self, handoff: Handoff, session: Session, installer: Installer, faults: Faults, pid: int) -> None:
        self.session = session
        self._handoff = handoff
        self._installer = installer
        self._faults = faults
        self.pid = pid
        self.spans = list(handoff.spans())
        """Where the guest's ordinary memory is mapped in its VMM: (address, bytes)."""
        self._watch: VmmWatch | None = None
        self._held = False

    @classmethod
    async def take_over(
        cls,
        vmm: Waiting,
        name: str,
        settings: Settings,
        opener: LaneOpener,
        lanes: Lanes,
        options: SessionOptions,
        paused: Callable[[FerryError | None], None],
    ) -> Arrival:
        """Have the VMM hand its memory over, to be filled by the open `lanes` and, when these are lost, by `opener`'s.

        `name` tells this arrival's sockets in the runtime directory from those of others. FerryError: HANDOFF_*; the
        lanes are closed then.
        """
        faults: Faults | None = None
        try:
            faults = await Faults.start(settings, name, vmm.pid)
            handoff = await _hand_off(vmm, settings, name, faults.endpoint)
        except BaseException:
            await lanes.close()
            if faults is not None:
                await faults.stop()
            raise
        exit_door, doors = handoff.doors()
        installer = handoff.installer()
        session = Session(handoff.layout, doors, installer, opener, options, paused, lanes)
        arrival = cls(handoff, session, installer, faults, vmm.pid)
        faults.connect(exit_door, session, handoff)
        try:
            arrival._watch = VmmWatch(vmm.pid, lambda: arrival._vmm_ended(vmm.pid))
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
        """Stop, and keep the guest's memory guarded: who touches a missing page waits, and reads no zeroes.

        When its VMM has ended, the rest is let go.
        """
        self._held = True
        await self._stop_serving()

    def _vmm_ended(self, pid: int) -> None:
        if self._held:
            self._handoff.close()
        else:
            self.session.fail(_gone(pid))

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
        await self._stop_serving()

    async def _stop_serving(self) -> None:
        await self._faults.stop()
        await self.session.close()


async def _hand_off(vmm: Waiting, settings: Settings, name: str, faults: FaultEndpoint) -> Handoff:
    """Ask the VMM to connect, and receive; whichever fails first tells why."""
    listener = HandoffListener(settings.runtime_dir / f"handoff-{name}.sock", vmm.layout, vmm.pid)
    receiving = asyncio.create_task(listener.receive(settings.limits.prepare_timeout))
    asking = asyncio.create_task(vmm.driver.attach_pager(str(listener.path), faults))
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
