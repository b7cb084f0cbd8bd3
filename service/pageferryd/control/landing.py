"""Where a guest's memory comes down at its destination: what its VMM hands over, or its driver takes or gives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pageferry.errors import FerryError, Reason
from pageferryd.control.faults import Faults
from pageferryd.destination.given_files import GivenMemory
from pageferryd.destination.handed_over import guarded, taken_again
from pageferryd.destination.handoff import HandoffListener
from pageferryd.linux.vmm_directory import VmmDirectory
from pageferryd.vmm.driver import GivenFiles, GuardedMemory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pageferryd.config import Settings
    from pageferryd.core.layout import Layout
    from pageferryd.core.refusals import Refusals
    from pageferryd.destination.handed_over import HandedOver
    from pageferryd.destination.lanes import LaneOpener, Lanes
    from pageferryd.vmm.driver import FaultEndpoint, VmmDriver

_SOCKET = "handoff.sock"
_AFTERWARDS_SECONDS = 2.0
"""How long memory may take once its VMM or driver says that it was handed over."""


@dataclass(frozen=True)
class Waiting:
    """A VMM that waits for a guest: how to reach it, the guest's memory, and its process."""

    driver: VmmDriver
    layout: Layout
    pid: int


class Landing:
    """The seat of one migration's pager, with its lanes open, until a VMM's memory has come to it."""

    def __init__(
        self,
        vmm: Waiting,
        settings: Settings,
        directory: VmmDirectory,
        faults: Faults,
        opener: LaneOpener,
        refusals: Refusals | None = None,
    ) -> None:
        self.vmm = vmm
        self.layout = vmm.layout
        self.directory = directory
        self.pager_faults = faults
        self.opener = opener
        self._lanes: Lanes | None = None
        self._seconds = settings.limits.prepare_timeout
        self._taken: asyncio.Future[HandedOver] = asyncio.get_running_loop().create_future()
        self._listener = HandoffListener(directory.path / _SOCKET, vmm.layout, vmm.pid, refusals)

    @classmethod
    async def open(
        cls,
        vmm: Waiting,
        name: str,
        settings: Settings,
        opener: LaneOpener,
        lanes: Lanes | None = None,
        fault_token: bytes = b"",
        refusals: Refusals | None = None,
    ) -> Self:
        """Listen for the VMM. `name` tells this migration's directory from others'; open `lanes` are taken over.

        `fault_token` is the secret that the VMM knows already; it is told a new one where that is empty.

        FerryError: PERMISSION_MISSING, VMM_GONE; the lanes are closed then.
        """
        directory: VmmDirectory | None = None
        faults: Faults | None = None
        try:
            directory = VmmDirectory.make(settings.runtime_dir, name, vmm.pid)
            faults = await Faults.start(settings, directory, fault_token, refusals)
            landing = cls(vmm, settings, directory, faults, opener, refusals)
        except BaseException:
            if lanes is not None:
                await lanes.close()
            if faults is not None:
                await faults.stop()
            if directory is not None:
                directory.remove()
            raise
        landing._lanes = lanes
        return landing

    @property
    def socket_path(self) -> str:
        """See PagerSeat."""
        return str(self.directory.seen / _SOCKET)

    @property
    def faults(self) -> FaultEndpoint:
        """See PagerSeat."""
        return self.pager_faults.endpoint

    def take(self, memory: GuardedMemory | GivenFiles) -> None:
        """See PagerSeat."""
        if isinstance(memory, GuardedMemory):
            taken: HandedOver = guarded(memory.uffd, memory.addresses, self.layout)
        else:
            taken = GivenMemory(self.layout, memory.files, memory.connection)
        self._take(taken)

    def take_again(self, kept: Mapping[str, int], addresses: Sequence[int]) -> None:
        """Take memory of which an earlier sidecar had these descriptors. FerryError(HANDOFF_*): they are closed."""
        self._take(taken_again(kept, addresses, self.layout))

    def _take(self, taken: HandedOver) -> None:
        if self._taken.done():
            taken.close()
            raise FerryError(Reason.INTERNAL, "the memory of this guest was taken already, or is wanted no longer")
        self._taken.set_result(taken)

    async def memory(self, asked: asyncio.Task[None]) -> HandedOver:
        """Wait for the memory, while `asked` makes the VMM hand it over; `asked` may still run after that.

        FerryError: HANDOFF_*, or what `asked` fails with.
        """
        accepting = asyncio.create_task(self._listener.receive(self._seconds))
        try:
            come: set[asyncio.Future[Any]] = {accepting, self._taken}
            await asyncio.wait({*come, asked}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                asked.result()
                await asyncio.wait(come, return_when=asyncio.FIRST_COMPLETED, timeout=_AFTERWARDS_SECONDS)
            if self._taken.done():
                return self._taken.result()
            if not accepting.done():
                raise FerryError(
                    Reason.HANDOFF_TIMEOUT, f"the VMM (process {self.vmm.pid}) did not hand its guest's memory over"
                )
            return accepting.result()
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            self._listener.close()

    def take_lanes(self) -> Lanes | None:
        """Return the open lanes, which are the caller's from now on."""
        lanes, self._lanes = self._lanes, None
        return lanes

    async def abandon(self) -> None:
        """No memory is wanted any more: let go what came meanwhile, and everything else."""
        if not self._taken.cancel() and not self._taken.cancelled():
            self._taken.result().close()
        lanes = self.take_lanes()
        if lanes is not None:
            await lanes.close()
        await self.close()

    async def close(self) -> None:
        """Take down what the VMM forwards faults to, and the directory."""
        self._listener.close()
        await self.pager_faults.stop()
        self.directory.remove()
