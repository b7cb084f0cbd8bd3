"""A virtual machine's descriptor: its memory slots, its guest_memfd, and what its KVM offers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Final

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.vmm import GuestMemfd, GuestMemory

DEVICE: Final = "/dev/kvm"
ALL_MEMORY_SLOT: Final = 0
STATUS_SLOT: Final = 1
FIRST_FREE_SLOT: Final = 2
_WANTED: Final = abi.GUEST_MEMFD_FLAG_MMAP | abi.GUEST_MEMFD_FLAG_INIT_SHARED


class Vm:
    """An empty VM of the KVM behind `device`."""

    def __init__(self, device: str = DEVICE) -> None:
        self._kvm = _open(device)
        try:
            self._vm = _create(self._kvm, device)
        except BaseException:
            os.close(self._kvm)
            raise
        self._keep_other_slots()

    def create_guest_memfd(self, size: int) -> GuestMemfd:
        """Return `size` bytes of memory that is reached by KVM without a userfaultfd, and mapped here all the same."""
        if self.offers(abi.KVM_CAP_GUEST_MEMFD_FLAGS) & _WANTED != _WANTED:
            raise FerryError(
                Reason.VMM_FAILED,
                "this kernel's KVM makes no guest_memfd that starts shared and can be mapped (Linux 6.18): choose "
                "another backing",
            )
        wish = abi.CreateGuestMemfd(size=size, flags=_WANTED)
        try:
            memfd = fcntl.ioctl(self._vm, abi.KVM_CREATE_GUEST_MEMFD, wish)
        except OSError as error:
            raise FerryError(Reason.NO_SPACE, f"KVM made no guest_memfd of {size} bytes: {error}") from error
        return GuestMemfd(memfd, size)

    def offers(self, capability: int) -> int:
        """Return what KVM answers when asked for a capability: 0 where it has none of it."""
        return fcntl.ioctl(self._vm, abi.KVM_CHECK_EXTENSION, capability)

    def add_slot(
        self,
        slot: int,
        memory: GuestMemory | GuestMemfd,
        guest_address: int = 0,
        offset: int = 0,
        size: int | None = None,
        *,
        userfault_bitmap: int = 0,
    ) -> None:
        """Let vCPUs reach `size` bytes of `memory` from `offset` on, at `guest_address`.

        With `userfault_bitmap`, the address of one, they exit on pages whose bit is set; VMM_FAILED where KVM does not
        know such a thing.
        """
        region = abi.UserspaceMemoryRegion2(
            slot=slot,
            guest_phys_addr=guest_address,
            memory_size=memory.size - offset if size is None else size,
            userspace_addr=memory.address + offset,
        )
        if isinstance(memory, GuestMemfd):
            region.flags = abi.KVM_MEM_GUEST_MEMFD
            region.guest_memfd, region.guest_memfd_offset = memory.memfd, offset
        if userfault_bitmap:
            region.flags |= abi.KVM_MEM_USERFAULT
            region.userfault_bitmap = userfault_bitmap
        self._set_slot(region)

    def remove_slot(self, slot: int) -> None:
        """Take a slot away: accesses to it leave the vCPU from now on."""
        self._set_slot(abi.UserspaceMemoryRegion2(slot=slot))

    def make_private(self, guest_address: int, size: int) -> None:
        """Say that pages are the guest's alone from now on. VMM_FAILED where KVM has no memory attributes."""
        attributes = abi.MemoryAttributes(address=guest_address, size=size, attributes=abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        try:
            fcntl.ioctl(self._vm, abi.KVM_SET_MEMORY_ATTRIBUTES, attributes)
        except OSError as error:
            raise FerryError(
                Reason.VMM_FAILED, f"KVM did not make {size} bytes at {guest_address:#x} private: {error}"
            ) from error

    def add_vcpu(self) -> tuple[int, mmap.mmap]:
        """Return the descriptor of a new vCPU and its mapped struct kvm_run."""
        try:
            size = fcntl.ioctl(self._kvm, abi.KVM_GET_VCPU_MMAP_SIZE)
            vcpu = fcntl.ioctl(self._vm, abi.KVM_CREATE_VCPU, 0)
        except OSError as error:
            raise FerryError(Reason.VMM_FAILED, f"KVM gave no vCPU: {error}") from error
        try:
            return vcpu, mmap.mmap(vcpu, size)
        except OSError as error:
            os.close(vcpu)
            raise FerryError(Reason.VMM_FAILED, f"cannot map the vCPU's {size} bytes: {error}") from error

    def close(self) -> None:
        """Let the machine go; its memory can be unmapped afterwards. A second call does nothing."""
        if self._vm >= 0:
            os.close(self._vm)
            os.close(self._kvm)
            self._vm = -1

    def _keep_other_slots(self) -> None:
        """Have KVM forget only what belongs to a slot that is taken away, where it can do that."""
        if self.offers(abi.KVM_CAP_DISABLE_QUIRKS2) & abi.KVM_X86_QUIRK_SLOT_ZAP_ALL:
            wish = abi.EnableCap(cap=abi.KVM_CAP_DISABLE_QUIRKS2)
            wish.args[0] = abi.KVM_X86_QUIRK_SLOT_ZAP_ALL
            fcntl.ioctl(self._vm, abi.KVM_ENABLE_CAP, wish)

    def _set_slot(self, region: abi.UserspaceMemoryRegion2) -> None:
        # Kernels before 6.8 know only the first struct, and nothing that the second one adds.
        request = abi.KVM_SET_USER_MEMORY_REGION2 if region.flags else abi.KVM_SET_USER_MEMORY_REGION
        argument = region if region.flags else bytes(region)[: ctypes.sizeof(abi.UserspaceMemoryRegion)]
        try:
            fcntl.ioctl(self._vm, request, argument)
        except OSError as error:
            raise FerryError(
                Reason.VMM_FAILED,
                f"KVM refused slot {region.slot} of {region.memory_size} bytes at {region.guest_phys_addr:#x}: {error}",
            ) from error


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
