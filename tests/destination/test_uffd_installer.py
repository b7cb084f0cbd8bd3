"""The userfaultfd installer over real memory of each kind."""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from guarded import DEADLINE, Guarded
from installer_conformance import CarefulConformance
from waiting_vmm import WaitingVmm

from pageferry.vmm.memory import Backing
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.destination.handoff import HandoffListener
from pageferryd.destination.uffd_installer import UffdInstaller

pytestmark = pytest.mark.userfaultfd

libc = ctypes.CDLL(None, use_errno=True)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class UffdSite:
    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.layout = guarded.layout
        self.granule = guarded.granule
        self.installer = UffdInstaller(guarded.uffd, guarded.addresses)

    def reading(self, page: int) -> Future[bytes]:
        return self._guarded.reading(page)

    def address_of(self, page: int) -> int:
        return self._guarded.addresses.address_of(page)

    def discarding(self, page: int) -> Future[None]:
        return self._guarded.discarding(page, self.granule)

    def wait_queued(self) -> None:
        self._guarded.wait_queued()

    def drain(self) -> None:
        self._guarded.uffd.read_events()

    def unmap(self, page: int) -> None:
        size = self.granule * PAGE_SIZE
        unmapping: Future[object] = self._guarded._threads.submit(libc.munmap, self.address_of(page), size)
        self.wait_queued()
        while not unmapping.done():
            self.drain()
        assert unmapping.result(DEADLINE) == 0

    def is_let_go(self) -> bool:
        return self._guarded.uffd.fileno() < 0


@pytest.fixture
def site(guard: Callable[..., Guarded], backing: Backing) -> UffdSite:
    return UffdSite(guard(2, 2, backing=backing))


@pytest.fixture
async def doomed(short_dir: Path) -> AsyncIterator[UffdInstaller]:
    """An installer whose VMM has ended."""
    path = short_dir / "handoff.sock"
    vmm = await WaitingVmm.start(path, 4)
    listener = HandoffListener(path, Layout([Region(0, 4 * PAGE_SIZE)]), vmm.pid)
    try:
        await vmm.tell("go")
        handoff = await listener.receive(DEADLINE)
    finally:
        listener.close()
        await vmm.kill()
    yield UffdInstaller(handoff.uffd, handoff.addresses)
    handoff.close()


class TestUffdInstaller(CarefulConformance):
    """Passes what every installer must."""
