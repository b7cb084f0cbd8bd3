"""A guest's memory at its destination: taken over from the VMM, filled, and let go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.destination.session import Session
from pageferryd.linux.pidfd import PidFd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pageferryd.control.landing import Landing
    from pageferryd.core.push_share import PushShare
    from pageferryd.destination.handed_over import HandedOver
    from pageferryd.destination.installer import Installer
    from pageferryd.destination.session import SessionOptions


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

    def __init__(self, memory: HandedOver, session: Session, installer: Installer, landing: Landing) -> None:
        self.session = session
        self._memory = memory
        self._installer = installer
        self._landing = landing
        self.pid = landing.vmm.pid
        self.spans = list(memory.spans())
        """Where the guest's ordinary memory is mapped in its VMM: (address, bytes)."""
        self._watch: VmmWatch | None = None
        self._held = False

    @classmethod
    async def of(
        cls,
        landing: Landing,
        asked: asyncio.Task[None],
        options: SessionOptions,
        paused: Callable[[FerryError | None], None],
        note_discard: Callable[[int, int], None],
        note_whole: Callable[[], None],
        share: PushShare | None,
    ) -> Arrival:
        """Receive the memory while `asked` has it handed over.

        `note_discard` is told of pages that are given away, `note_whole` that all are in place, before the source is.

        FerryError: HANDOFF_*, or what `asked` fails with; the landing is abandoned then.
        """
        try:
            memory = await landing.memory(asked)
        except BaseException:
            await landing.abandon()
            raise
        exit_door, doors = memory.doors()
        installer = memory.installer()
        lanes = landing.take_lanes()
        session = Session(
            memory.layout,
            doors,
            installer,
            landing.opener,
            options,
            paused,
            lanes,
            note_discard,
            note_whole,
            share=share,
        )
        arrival = cls(memory, session, installer, landing)
        landing.pager_faults.connect(exit_door, session, memory)
        try:
            arrival._watch = VmmWatch(arrival.pid, arrival._vmm_ended)
        except BaseException:
            # The guest has never run: nobody can read what is missing.
            await arrival.abandon()
            raise
        return arrival

    async def look_what_is_there(self) -> None:
        """Count pages as present that are in place: an earlier sidecar has filled them."""
        for first, pages in await self._memory.in_place(self.pid):
            self.session.pager.found(first, pages)

    def give_away_missing(self) -> None:
        """Count pages as given away that are not in place."""
        pager = self.session.pager
        for first, pages in list(pager.map.missing_runs(0, pager.layout.page_count)):
            self.session.intake.restore(first, pages)

    def wake_all(self) -> None:
        """Have everybody that waits for a page touch it again."""
        self._installer.wake(0, self.session.pager.layout.page_count)

    @property
    def guarded_addresses(self) -> Sequence[int]:
        """Where the regions lie in the VMM; empty where that is not known."""
        return self._memory.guarded_addresses

    @property
    def kept(self) -> Mapping[str, int]:
        """Descriptors with which a later sidecar can go on, by name."""
        return self._memory.kept

    @property
    def fault_token(self) -> bytes:
        """The secret with which the VMM forwards faults."""
        return self._landing.faults.token

    async def let_go(self) -> None:
        """Every page is in: as soon as the VMM asks for nothing more, the guest needs the sidecar no longer."""
        await self._memory.finished()
        await self._stop()
        self._installer.release()
        self._memory.let_go()

    async def abandon(self) -> None:
        """The VMM has ended, or was never to run: its memory is nobody's."""
        await self._stop()
        self._memory.close()

    async def hold(self) -> None:
        """Stop, and keep the guest's memory guarded: who touches a missing page waits, and reads no zeroes.

        When its VMM has ended, the rest is let go.
        """
        self._held = True
        await self._stop_serving()

    def _vmm_ended(self) -> None:
        if self._held:
            self._memory.close()
        else:
            self.session.fail(_gone(self.pid))

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
        await self._stop_serving()

    async def _stop_serving(self) -> None:
        await self._landing.close()
        await self.session.close()


def _gone(pid: int) -> FerryError:
    return FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) ended while its guest's memory was coming")
