"""A guest_memfd, which only KVM makes."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# linux/kvm.h: _IO(KVMIO, 0x01), _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
KVM_CREATE_VM = 0xAE01
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
MMAP, INIT_SHARED = 1, 2


@contextmanager
def guest_memfd(size: int, flags: int = MMAP | INIT_SHARED) -> Iterator[int]:
    """Make one of `size` bytes; skip the test where KVM has none that can be mapped."""
    opened: list[int] = []
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[0], KVM_CREATE_VM, 0))
        opened.append(
            fcntl.ioctl(opened[1], KVM_CREATE_GUEST_MEMFD, bytearray(struct.pack("8Q", size, flags, *[0] * 6)))
        )
    except OSError as error:
        _close(opened)
        pytest.skip(f"KVM makes no guest_memfd: {error}")
    try:
        yield opened[2]
    finally:
        _close(opened)


def _close(opened: list[int]) -> None:
    for fd in reversed(opened):
        os.close(fd)
