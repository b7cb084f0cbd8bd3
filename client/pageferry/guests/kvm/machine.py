"""The guest's machine: a VM, its memory, and a vCPU that starts in 64-bit mode."""

from __future__ import annotations

from typing import Final

from pageferry.abi import kvm as abi
from pageferry.guests.kvm.layout import Layout
from pageferry.guests.kvm.vcpu import Report, Vcpu
from pageferry.guests.kvm.vm import ALL_MEMORY_SLOT, DEVICE, STATUS_SLOT, Vm
from pageferry.vmm import Backing, GuestMemfd, GuestMemory

_USER_CODE, _USER_DATA = 0x33, 0x2B
"""Selectors with privilege level 3, as Linux has them: there is no descriptor table, the hidden parts are set."""
_CODE_64: Final = 0xB
_DATA: Final = 0x3


class Machine:
    """A VM with memory from address 0 and the page of the status behind it. It touches neither.

    The vCPU can reach its memory at once, but for a guest_memfd: whoever fills that calls `let_in`, or lets in page by
    page what has come.
    """

    def __init__(self, size: int, backing: Backing, on_report: Report, device: str = DEVICE) -> None:
        self._layout = Layout.of(size)
        self.vm = Vm(device)
        self.status = GuestMemory(4096)
        try:
            self.memory = self._make_memory(size, backing)
            try:
                self.vm.add_slot(STATUS_SLOT, self.status, self._layout.status_page)
                if backing is not Backing.GUEST_MEMFD:
                    self.let_in()
                self.vcpu = Vcpu(*self.vm.add_vcpu(), self._layout.report_page, on_report)
            except BaseException:
                self.memory.close()
                raise
        except BaseException:
            self.vm.close()
            self.status.close()
            raise

    def let_in(self) -> None:
        """Let the vCPU reach all of the memory."""
        self.vm.add_slot(ALL_MEMORY_SLOT, self.memory)

    def start_registers(self) -> abi.Sregs:
        """Return the segment and control registers with which the program starts: paging on, privilege level 3."""
        sregs = self.vcpu.sregs()
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(code=name == "cs"))
        sregs.cr0 = abi.CR0_PE | abi.CR0_ET | abi.CR0_NE | abi.CR0_WP | abi.CR0_PG
        sregs.cr3 = self._layout.root_table
        sregs.cr4 = abi.CR4_PAE
        sregs.efer = abi.EFER_LME | abi.EFER_LMA
        return sregs

    def close(self) -> None:
        """Let the stopped machine and its memory go. A second call does nothing."""
        self.vcpu.close()
        self.vm.close()
        self.memory.close()
        self.status.close()

    def _make_memory(self, size: int, backing: Backing) -> GuestMemory | GuestMemfd:
        if backing is Backing.GUEST_MEMFD:
            return self.vm.create_guest_memfd(size)
        return GuestMemory(size, backing)


def _segment(*, code: bool) -> abi.Segment:
    return abi.Segment(
        limit=0xFFFFFFFF,
        selector=_USER_CODE if code else _USER_DATA,
        type=_CODE_64 if code else _DATA,
        present=1,
        dpl=3,
        db=not code,
        s=1,
        l=code,
        g=1,
    )
