"""What an incoming guest on guest_memfd does about pages that have not come: nothing in the kernel waits for them.

A KVM with userfault bitmaps exits with KVM_EXIT_MEMORY_FAULT on them, and the access is made again once the page is
there. On any other they are left out of the memory slots: the access exits as one to a device, and is completed here
with the page's own bytes. An instruction fetch and a walk of the page tables cannot exit like that, so what they need
is brought in beforehand. Which of the two it is, KVM decides by taking or refusing such a slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.slots import SparseSlots
from pageferry.guests.kvm.vm import ALL_MEMORY_SLOT, Vm
from pageferry.vmm import (
    Access,
    FaultForwarder,
    GuestMemfd,
    Import,
    ImportResult,
    Outcome,
    Resolution,
    UserfaultBitmap,
)
from pageferry.vmm.regions import PAGE_SIZE

_VCPU: Final = 0
_MOST_PAGES: Final = 512
"""A fault names 2 MiB at most."""


class AbsentPages:
    """The pages of `memory`, which begins at guest address 0, that `bitmap` says are missing."""

    def __init__(self, vm: Vm, memory: GuestMemfd, bitmap: UserfaultBitmap, forwarder: FaultForwarder) -> None:
        self._vm = vm
        self._memory = memory
        self._bitmap = bitmap
        self._forwarder = forwarder
        self.faults = 0
        self.longest_stall = 0.0
        self.slots = None if _watched_by_kvm(vm, memory, bitmap) else SparseSlots(vm, memory, bitmap)

    def bring_in(self, offset: int, length: int) -> None:
        """Get the pages of the range, in bytes, and let the vCPU reach them, before it needs them to run at all."""
        if self.slots is None:
            return
        self._require(offset, length)
        page, end = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        while page < end:
            page = self.slots.let_in(page)

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of the range, once all of it has come."""
        self._require(offset, length)
        return self._memory.read(offset, length)

    def complete(self, mmio: abi.RunMmio) -> bool:
        """Complete an access that exited as one to a device; False where it is none to memory.

        In the vCPU's thread. The kernel splits an access at the end of a page.
        """
        address: int = mmio.phys_addr
        if address >= self._memory.size or self.slots is None:
            return False
        page = address // PAGE_SIZE
        access = Access.WRITE if mmio.is_write else Access.READ
        if self.slots.crowded:
            first, end = self.slots.chunk_of(page)
            self._require(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
        elif self._bitmap.is_set(page):
            self._resolve(page * PAGE_SIZE, PAGE_SIZE, access)
        self.slots.let_in(page)
        if mmio.is_write:
            self._memory.write(address, bytes(mmio.data[: mmio.len]))
        else:
            mmio.data[: mmio.len] = self._memory.read(address, mmio.len)
        return True

    def resolve_exit(self, fault: abi.RunMemoryFault) -> None:
        """Make an access possible that exited with KVM_EXIT_MEMORY_FAULT; the vCPU makes it again. In its thread."""
        private = bool(fault.flags & abi.KVM_MEMORY_EXIT_FLAG_PRIVATE)
        if not private and not fault.flags & abi.KVM_MEMORY_EXIT_FLAG_USERFAULT:
            raise FerryError(
                Reason.VMM_FAILED,
                f"the vCPU cannot reach {fault.gpa:#x}, and not for want of a page ({fault.flags:#x})",
            )
        if not private and not self._bitmap.is_set(fault.gpa // PAGE_SIZE):
            return
        start = fault.gpa - fault.gpa % PAGE_SIZE
        self._resolve(start, PAGE_SIZE, Access.UNKNOWN, private=private, exit_flags=fault.flags)

    def close(self) -> None:
        """Let the pager go. A fault that still waits ends well if its page has come, and with an error if not."""
        self._forwarder.close()

    def settle(self) -> None:
        """Let the stopped vCPU reach everything, since everything has come, and let the bitmap go."""
        if self.slots is not None:
            self.slots.let_in_all()
        else:
            self._vm.remove_slot(ALL_MEMORY_SLOT)
            self._vm.add_slot(ALL_MEMORY_SLOT, self._memory)
        self.forget()

    def forget(self) -> None:
        """Let the bitmap go. Nothing may be asked any more."""
        self._bitmap.close()

    def _resolve(self, address: int, size: int, access: Access, *, private: bool = False, exit_flags: int = 0) -> None:
        """Wait for one fault of the vCPU to be resolved."""
        began = time.monotonic()
        ask = partial(self._forwarder.resolve, _VCPU, address, size, access, private=private, exit_flags=exit_flags)
        self._settle_one(ask, address, size)
        self.faults += 1
        self.longest_stall = max(self.longest_stall, time.monotonic() - began)

    def _require(self, offset: int, length: int) -> None:
        """Wait until each page of the range has come."""
        first, end = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        waiting = []
        for start in range(first, end, _MOST_PAGES):
            for low, high in self._bitmap.set_runs(start, min(start + _MOST_PAGES, end)):
                address, size = low * PAGE_SIZE, (high - low) * PAGE_SIZE
                waiting.append((self._forwarder.submit(_VCPU, address, size, Access.READ), address, size))
        for future, address, size in waiting:
            self._settle_one(future.result, address, size)

    def _settle_one(self, wait: Callable[[], Resolution], address: int, size: int) -> None:
        pages = range(address // PAGE_SIZE, (address + size) // PAGE_SIZE)
        try:
            resolution = wait()
        except FerryError:
            # The pages may have come ahead of an answer that is lost: the bitmap knows.
            if any(map(self._bitmap.is_set, pages)):
                raise
            return
        if resolution.outcome is Outcome.POISONED:
            raise FerryError(
                Reason.MEMORY_UNREADABLE,
                f"the source could not read the guest's memory at {address:#x}: other VMMs give a machine check here",
            )
        if resolution.outcome is Outcome.DELIVERED:
            self._import(resolution)
        elif any(map(self._bitmap.is_set, pages)):
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                f"the pager says {resolution.outcome.name} of {size} bytes at {address:#x}, but has not cleared all of "
                "their bits",
            )

    def _import(self, page: Resolution) -> None:
        """Take what was delivered into private memory; a page that is only pending comes without bytes."""
        if len(page.payload) not in (0, page.size):
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                f"{len(page.payload)} bytes came for {page.size} at {page.guest_address:#x}, which are no plain pages",
            )
        if page.payload:
            self._memory.write(page.guest_address, page.payload)
        self._vm.make_private(page.guest_address, page.size)
        self._forwarder.report_imports([Import(page.guest_address, page.size, ImportResult.DONE)])


def _watched_by_kvm(vm: Vm, memory: GuestMemfd, bitmap: UserfaultBitmap) -> bool:
    """Put all memory under KVM's own userfault bitmap, if it knows one.

    Should that flag have come to mean something else, then the first thing that the vCPU needs, its page tables, is
    missing without an exit: it stops with a triple fault before it has run a single instruction.
    """
    try:
        vm.add_slot(ALL_MEMORY_SLOT, memory, userfault_bitmap=bitmap.address)
    except FerryError:
        return False
    return True
