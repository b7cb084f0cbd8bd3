"""The driver for Cloud Hypervisor (v53 or newer), by its HTTP API and as the local peer of its live migration."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.unix_peer import listener_pid
from pageferryd.vmm.cloud_hypervisor.api import CloudHypervisorApi
from pageferryd.vmm.cloud_hypervisor.description import PAUSED, RUNNING, describe
from pageferryd.vmm.cloud_hypervisor.destination_peer import DestinationPeer
from pageferryd.vmm.cloud_hypervisor.source_peer import SourcePeer
from pageferryd.vmm.driver import Description, PrivatePages, Saved
from pageferryd.vmm.http_api import QUICK_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from pageferry.v1 import vmm_pb2
    from pageferryd.vmm.driver import PagerSeat

DRIVER = "cloud-hypervisor"
_EXIT_SECONDS = 5.0
_RESUME_SECONDS = 10.0
_AGAIN_SECONDS = 0.01


class CloudHypervisorDriver:
    """One VMM behind its API socket. `runtime_dir` is where directories for its sockets are made."""

    memory_comes_with_state = True

    def __init__(self, address: str, runtime_dir: Path) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the address is absolute and fits a socket address."""
        self._api = CloudHypervisorApi(address)
        self._runtime_dir = runtime_dir
        self._vmm = f"the VMM at {self._api.path}"
        self._process: PidFd | None = None
        self._seat: PagerSeat | None = None
        self._source: SourcePeer | None = None
        self._destination: DestinationPeer | None = None

    async def describe(self) -> Description:
        """Ask for the VM; the process id is the listener's, as the kernel knows it."""
        pid = await asyncio.to_thread(listener_pid, self._api.path, QUICK_SECONDS)
        if self._process is None or self._process.pid != pid or self._process.exited:
            self._let_process_go()
            self._process = PidFd(pid)
        return describe(await self._api.info(), pid, self._vmm)

    async def attach_pager(self, seat: PagerSeat) -> None:
        """Remember who will fill the memory: the VMM gets it with the state."""
        self._seat = seat

    async def ready_to_pause(self) -> None:
        """Nothing can be done before."""

    async def pause(self) -> None:
        """Stop the guest."""
        await self._bring(PAUSED, self._api.pause, 0.0)

    async def save_state(self) -> Saved:
        """Take the guest as the local peer of its migration, up to the last answer."""
        await self._let_peers_go()
        self._source = SourcePeer(self._api, self._runtime_dir, self._required_process().pid)
        saved, memory = await self._source.take()
        return Saved(await asyncio.to_thread(saved.pack), memory)

    async def private_pages(self) -> PrivatePages:
        """Return none: all of a guest's memory is in its files."""
        return PrivatePages()

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Refuse: no page is opaque."""
        raise FerryError(Reason.INVALID_ARGUMENT, f"{self._vmm} has no opaque pages, {len(guest_addresses)} were asked")

    async def load_state(self, state: bytes) -> None:
        """Give the guest to the VMM, and its memory files to the pager's seat."""
        seat, self._seat = self._seat, None
        if seat is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"{self._vmm} has no pager that fills its guest's memory")
        await self._let_peers_go()
        self._destination = DestinationPeer(self._api, seat, self._required_process().pid)
        await self._destination.give(state)

    async def resume(self) -> None:
        """Let the guest run: at its destination, or again here, taking the migration back first."""
        if self._destination is not None:
            await self._destination.run()
            await self._let_peers_go()
            return
        source, self._source = self._source, None
        if source is not None:
            await source.refuse()
        # It has its guest back a moment after it has given the migration up.
        await self._bring(RUNNING, self._api.resume, _RESUME_SECONDS)

    async def detach_pager(self) -> None:
        """Nothing: the VMM has hung up by itself."""

    async def kill(self) -> None:
        """End the VMM: with its migration where it has one to end, else by its API, else by a signal."""
        if self._destination is not None:
            await self._destination.close()
            self._destination = None
        elif self._source is not None:
            await self._source.complete()
            if await self._ended(_EXIT_SECONDS):
                return
        process = self._process
        if process is None or process.exited:
            return
        try:
            await self._api.shutdown()
            if await self._ended(_EXIT_SECONDS):
                return
        except FerryError:
            # It may be gone before it answers, or answer nothing any more: the signal settles it.
            if await self._ended(0.0):
                return
        await asyncio.to_thread(_send_kill, process)
        if not await self._ended(_EXIT_SECONDS):
            raise FerryError(Reason.VMM_FAILED, f"{self._vmm} (process {process.pid}) was killed, and has not ended")

    async def close(self) -> None:
        """Let the migration's connections and memory go, and the process's handle."""
        await self._let_peers_go()
        self._let_process_go()

    async def _bring(self, state: str, call: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Make `call` until the VM is in `state`, for `seconds` at most; at least once."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                await call()
            except FerryError as error:
                if error.reason is not Reason.VMM_FAILED:
                    raise
                info = await self._api.info()
                if info is not None and info.get("state") == state:
                    return
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            else:
                return
            await asyncio.sleep(_AGAIN_SECONDS)

    def _required_process(self) -> PidFd:
        if self._process is None:
            raise FerryError(Reason.ILLEGAL_STATE, f"{self._vmm} was not described yet")
        return self._process

    async def _ended(self, seconds: float) -> bool:
        return self._process is None or await asyncio.to_thread(self._process.wait, seconds)

    async def _let_peers_go(self) -> None:
        source, self._source = self._source, None
        destination, self._destination = self._destination, None
        for peer in (source, destination):
            if peer is not None:
                await peer.close()

    def _let_process_go(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


def _send_kill(process: PidFd) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except FerryError as error:
        if error.reason is not Reason.VMM_GONE:
            raise
