"""A virtual machine on /dev/kvm: its descriptor, its memory slots, and a vCPU that starts in 64-bit mode."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.layout import Layout
from pageferry.guests.kvm.vcpu import Report, Vcpu
from pageferry.vmm import GuestMemory

DEVICE: Final = "/dev/kvm"

_USER_CODE, _USER_DATA = 0x33, 0x2B
"""Selectors with privilege level 3, as Linux has them: there is no descriptor table, the hidden parts are set."""
_CODE_64: Final = 0xB
_DATA: Final = 0x3


class Machine:
    """A VM with `memory` from address 0 and the page of the status behind it. It touches neither."""

    def __init__(self, memory: GuestMemory, status: GuestMemory, on_report: Report, device: str = DEVICE) -> None:
        self._layout = Layout.of(memory.size)
        kvm = _open(device)
        try:
            self._vm = _create(kvm, device)
            try:
                self._add_slot(0, 0, memory)
                self._add_slot(1, self._layout.status_page, status)
                self.vcpu = self._add_vcpu(kvm, on_report)
            except BaseException:
                os.close(self._vm)
                raise
        finally:
            os.close(kvm)

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
        """Let the stopped machine go; its memory can be unmapped afterwards. A second call does nothing."""
        if self._vm >= 0:
            self.vcpu.close()
            os.close(self._vm)
            self._vm = -1

    def _add_slot(self, slot: int, address: int, memory: GuestMemory) -> None:
        region = abi.UserspaceMemoryRegion(
            slot=slot, guest_phys_addr=address, memory_size=memory.size, userspace_addr=memory.address
        )
        try:
            fcntl.ioctl(self._vm, abi.KVM_SET_USER_MEMORY_REGION, region)
        except OSError as error:
            raise FerryError(
                Reason.VMM_FAILED, f"KVM refused {memory.size} bytes of memory at {address:#x}: {error}"
            ) from error

    def _add_vcpu(self, kvm: int, on_report: Report) -> Vcpu:
        try:
            size = fcntl.ioctl(kvm, abi.KVM_GET_VCPU_MMAP_SIZE)
            vcpu = fcntl.ioctl(self._vm, abi.KVM_CREATE_VCPU, 0)
        except OSError as error:
            raise FerryError(Reason.VMM_FAILED, f"KVM gave no vCPU: {error}") from error
        try:
            run = mmap.mmap(vcpu, size)
        except OSError as error:
            os.close(vcpu)
            raise FerryError(Reason.VMM_FAILED, f"cannot map the vCPU's {size} bytes: {error}") from error
        return Vcpu(vcpu, run, self._layout.report_page, on_report)


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


def _open(device: str) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"may not open {device}: add this user to the group that owns it (often kvm), or run as root",
        ) from error
    except OSError as error:
        raise FerryError(
            Reason.VMM_FAILED,
            f"cannot open {device}: {os.strerror(error.errno or 0)}; load the module kvm_intel or kvm_amd, enable "
            "virtualization in the firmware or for this nested machine, or use the process guest",
        ) from error


def _create(kvm: int, device: str) -> int:
    try:
        version = fcntl.ioctl(kvm, abi.KVM_GET_API_VERSION)
        if version != abi.KVM_API_VERSION:
            raise FerryError(
                Reason.VMM_FAILED, f"{device} speaks version {version} of the KVM API, not {abi.KVM_API_VERSION}"
            )
        return fcntl.ioctl(kvm, abi.KVM_CREATE_VM)
    except OSError as error:
        hint = "is it the device of KVM?" if error.errno == errno.ENOTTY else "does another hypervisor run?"
        raise FerryError(Reason.VMM_FAILED, f"{device} gave no virtual machine: {error}; {hint}") from error
