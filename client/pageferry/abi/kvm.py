"""The KVM ABI that a bare x86-64 guest needs: numbers and structs of linux/kvm.h and asm/kvm.h (Linux 6.18).

Read beside Documentation/virt/kvm/api.rst of the kernel. Structs are ctypes structures in the kernel's own layout.
"""

from __future__ import annotations

import ctypes
from typing import Final

_U8, _U16, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


def _ioc(direction: int, number: int, size: int) -> int:
    """Return an ioctl number as _IOC of asm-generic/ioctl.h builds it, for the type 0xAE of KVM."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


class UserspaceMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region: one memory slot. Addresses and sizes in bytes."""

    _fields_ = (
        ("slot", _U32),
        ("flags", _U32),
        ("guest_phys_addr", _U64),
        ("memory_size", _U64),
        ("userspace_addr", _U64),
    )


class UserspaceMemoryRegion2(ctypes.Structure):
    """struct kvm_userspace_memory_region2: one memory slot, backed by a guest_memfd too where its flag is set.

    `userfault_bitmap` is padding in Linux 6.18. It is where the patches that propose KVM_MEM_USERFAULT put a pointer.
    """

    _fields_ = (
        *UserspaceMemoryRegion._fields_,
        ("guest_memfd_offset", _U64),
        ("guest_memfd", _U32),
        ("padding1", _U32),
        ("userfault_bitmap", _U64),
        ("padding2", _U64 * 13),
    )


class CreateGuestMemfd(ctypes.Structure):
    """struct kvm_create_guest_memfd: size in bytes, GUEST_MEMFD_FLAG_* bits."""

    _fields_ = (("size", _U64), ("flags", _U64), ("reserved", _U64 * 6))


class MemoryAttributes(ctypes.Structure):
    """struct kvm_memory_attributes: what the pages of a range of guest addresses become."""

    _fields_ = (("address", _U64), ("size", _U64), ("attributes", _U64), ("flags", _U64))


class EnableCap(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = (("cap", _U32), ("flags", _U32), ("args", _U64 * 4), ("padding", _U8 * 64))


GENERAL_REGISTERS: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip


class Regs(ctypes.Structure):
    """struct kvm_regs: the general registers, in the order of GENERAL_REGISTERS."""

    _fields_ = tuple((name, _U64) for name in GENERAL_REGISTERS)


class Segment(ctypes.Structure):
    """struct kvm_segment: a segment register with its hidden descriptor."""

    _fields_ = (
        ("base", _U64),
        ("limit", _U32),
        ("selector", _U16),
        *((name, _U8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    )


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable: GDTR or IDTR."""

    _fields_ = (("base", _U64), ("limit", _U16), ("padding", _U16 * 3))


class Sregs(ctypes.Structure):
    """struct kvm_sregs: segments, control registers and EFER."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, DescriptorTable) for name in ("gdt", "idt")),
        *((name, _U64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", _U64 * 4),
    )


class SignalMask(ctypes.Structure):
    """struct kvm_signal_mask with the kernel's 64-bit sigset: bit n - 1 blocks signal n inside KVM_RUN."""

    _pack_ = 1
    _fields_ = (("len", _U32), ("sigset", _U64))


class RunMmio(ctypes.Structure):
    """The member `mmio` of the union in struct kvm_run: an access to an address without memory."""

    _fields_ = (("phys_addr", _U64), ("data", _U8 * 8), ("len", _U32), ("is_write", _U8))


class RunMemoryFault(ctypes.Structure):
    """The member `memory_fault` of the union in struct kvm_run: an access that the VMM has to make possible."""

    _fields_ = (("flags", _U64), ("gpa", _U64), ("size", _U64))


class RunFailEntry(ctypes.Structure):
    """The member `fail_entry` of the union in struct kvm_run."""

    _fields_ = (("hardware_entry_failure_reason", _U64), ("cpu", _U32))


class _RunUnion(ctypes.Union):
    """The union in struct kvm_run; `suberror` is the first word of its member `internal`."""

    _fields_ = (("mmio", RunMmio), ("memory_fault", RunMemoryFault), ("fail_entry", RunFailEntry), ("suberror", _U32))


class Run(ctypes.Structure):
    """struct kvm_run as far as it is read here; the mapping of the vCPU begins with it."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", _U8),
        ("immediate_exit", _U8),
        ("padding1", _U8 * 6),
        ("exit_reason", _U32),
        ("ready_for_interrupt_injection", _U8),
        ("if_flag", _U8),
        ("flags", _U16),
        ("cr8", _U64),
        ("apic_base", _U64),
        ("exit", _RunUnion),
    )


KVM_API_VERSION: Final = 12

KVM_GET_API_VERSION: Final = _ioc(0, 0x00, 0)
KVM_CREATE_VM: Final = _ioc(0, 0x01, 0)
KVM_CHECK_EXTENSION: Final = _ioc(0, 0x03, 0)
KVM_GET_VCPU_MMAP_SIZE: Final = _ioc(0, 0x04, 0)
KVM_CREATE_VCPU: Final = _ioc(0, 0x41, 0)
KVM_SET_USER_MEMORY_REGION: Final = _ioc(1, 0x46, ctypes.sizeof(UserspaceMemoryRegion))
KVM_SET_USER_MEMORY_REGION2: Final = _ioc(1, 0x49, ctypes.sizeof(UserspaceMemoryRegion2))
KVM_RUN: Final = _ioc(0, 0x80, 0)
KVM_GET_REGS: Final = _ioc(2, 0x81, ctypes.sizeof(Regs))
KVM_SET_REGS: Final = _ioc(1, 0x82, ctypes.sizeof(Regs))
KVM_GET_SREGS: Final = _ioc(2, 0x83, ctypes.sizeof(Sregs))
KVM_SET_SREGS: Final = _ioc(1, 0x84, ctypes.sizeof(Sregs))
KVM_SET_SIGNAL_MASK: Final = _ioc(1, 0x8B, 4)
"""The number counts only the fixed part of struct kvm_signal_mask."""
KVM_ENABLE_CAP: Final = _ioc(1, 0xA3, ctypes.sizeof(EnableCap))
KVM_SET_MEMORY_ATTRIBUTES: Final = _ioc(1, 0xD2, ctypes.sizeof(MemoryAttributes))
KVM_CREATE_GUEST_MEMFD: Final = _ioc(3, 0xD4, ctypes.sizeof(CreateGuestMemfd))

KVM_CAP_DISABLE_QUIRKS2: Final = 213
KVM_CAP_GUEST_MEMFD_FLAGS: Final = 244
KVM_X86_QUIRK_SLOT_ZAP_ALL: Final = 1 << 7
"""While it is on, taking one slot away makes KVM forget what it knows of all others."""

KVM_MEM_GUEST_MEMFD: Final = 1 << 2
KVM_MEM_USERFAULT: Final = 1 << 3
"""Not in Linux 6.18: exit on pages whose bit is set in the slot's userfault bitmap."""
GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
KVM_MEMORY_EXIT_FLAG_USERFAULT: Final = 1 << 4

KVM_EXIT_MMIO: Final = 6
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_MEMORY_FAULT: Final = 39
"""KVM_RUN fails with EFAULT or EHWPOISON then."""

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
RFLAGS_RESERVED: Final = 1 << 1
"""Bit 1 of RFLAGS is always set: Intel SDM volume 1, 3.4.3."""
