"""Guest memory in a guest_memfd: KVM reaches it without the VMM's mapping, so no userfaultfd sees a vCPU's access."""

from __future__ import annotations

import ctypes
import os

from pageferry.errors import FerryError, Reason
from pageferry.vmm.handoff import HandoffRegion
from pageferry.vmm.mapping import MappedMemory
from pageferry.vmm.regions import PAGE_SIZE, ProcessMemory, Region

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
# From linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


class GuestMemfd(MappedMemory):
    """A mapping of the guest_memfd `memfd`, all `size` bytes of it, which it owns from now on.

    The descriptor was made by KVM_CREATE_GUEST_MEMFD with the flags MMAP and INIT_SHARED (Linux 6.18). A missing page
    reads as zeroes here: nothing waits for it, so ask the pager's FaultService before touching one.
    """

    page_size = PAGE_SIZE

    def __init__(self, memfd: int, size: int) -> None:
        self.memfd = memfd
        try:
            super().__init__(size, memfd)
        except BaseException:
            os.close(memfd)
            raise

    def discard(self, offset: int, length: int) -> None:
        """Give the pages of the range back to the host, as a balloon does; whole pages only. They are zero then."""
        if offset % PAGE_SIZE or length % PAGE_SIZE:
            raise ValueError(f"cannot discard {length} bytes at {offset}: not whole pages of {PAGE_SIZE}")
        self._at(offset, length)
        if _fallocate(self.memfd, _KEEP_SIZE | _PUNCH_HOLE, offset, length):
            number = ctypes.get_errno()
            raise FerryError(
                Reason.VMM_FAILED, f"cannot discard {length} bytes of guest_memfd at {offset}: {os.strerror(number)}"
            )

    def location(self, offset: int = 0) -> ProcessMemory:
        """Return where another process can read the bytes from `offset` on: a guest_memfd has no read(2)."""
        return ProcessMemory(self.address + offset)

    def region(self, guest_address: int = 0) -> Region:
        """Return all of the memory as one region of the guest."""
        return Region(guest_address, self.size, PAGE_SIZE, self.location())

    def handoff_regions(self, guest_address: int = 0) -> list[HandoffRegion]:
        """Return the table for a hand-off: one region."""
        return [HandoffRegion(self.address, self.size, 0, PAGE_SIZE, guest_address, is_guest_memfd=True)]

    def close(self) -> None:
        """Unmap the memory and close its descriptor. A second call does nothing."""
        super().close()
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1
