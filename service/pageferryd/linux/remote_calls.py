"""What the sidecar has another process do to itself: make a userfaultfd, close a descriptor, empty memory.

Each takes a Tracee, which is standing, and says FerryError as it does. Numbers are of x86-64 (syscall_64.tbl).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.userfaultfd import DEVICE

if TYPE_CHECKING:
    from pageferryd.linux.ptrace import Tracee

_NR_CLOSE, _NR_IOCTL, _NR_MADVISE, _NR_OPENAT = 3, 16, 28, 257
_AT_FDCWD = -100
_MADV_DONTNEED, _MADV_DONTNEED_LOCKED = 4, 24
_UFFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENXIO, errno.ENODEV)


def make_userfaultfd(tracee: Tracee) -> int:
    """Have the process make a userfaultfd that sees faults of the kernel too; return its descriptor there.

    No API is agreed on it yet. FerryError: PERMISSION_MISSING, USERFAULTFD_UNAVAILABLE, VMM_FAILED.
    """
    try:
        return tracee.call(abi.NR_USERFAULTFD, _UFFD_FLAGS)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES):
            raise _no_userfaultfd(tracee, error) from error
    return _from_device(tracee)


def close_descriptor(tracee: Tracee, fd: int) -> None:
    """Have the process close one of its descriptors. FerryError(VMM_FAILED) where it has no such one."""
    try:
        tracee.call(_NR_CLOSE, fd)
    except OSError as error:
        raise FerryError(
            Reason.VMM_FAILED, f"process {tracee.pid} could not close its descriptor {fd}: {error.strerror}"
        ) from error


def discard(tracee: Tracee, address: int, length: int, meanwhile: Callable[[], None]) -> None:
    """Have the process drop the pages of private memory, locked or not.

    Where the memory is registered with EVENT_REMOVE, this waits until `meanwhile` has read that event.
    """
    try:
        try:
            tracee.call(_NR_MADVISE, address, length, _MADV_DONTNEED, meanwhile=meanwhile)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            tracee.call(_NR_MADVISE, address, length, _MADV_DONTNEED_LOCKED, meanwhile=meanwhile)
    except OSError as error:
        raise FerryError(
            Reason.VMM_FAILED,
            f"process {tracee.pid} could not drop {length} bytes at {address:#x}: {error.strerror}; locked memory "
            "needs Linux 5.18 or newer",
        ) from error


def _from_device(tracee: Tracee) -> int:
    """Make the userfaultfd from the device, as the process sees it: its root directory, its user."""
    path = tracee.put_bytes(os.fsencode(DEVICE) + b"\0")
    try:
        device = tracee.call(_NR_OPENAT, _AT_FDCWD, path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_userfaultfd(tracee, error) from error
    try:
        return tracee.call(_NR_IOCTL, device, abi.USERFAULTFD_IOC_NEW, _UFFD_FLAGS)
    except OSError as error:
        raise _no_userfaultfd(tracee, error) from error
    finally:
        close_descriptor(tracee, device)


def _no_userfaultfd(tracee: Tracee, error: OSError) -> FerryError:
    if error.errno in _REFUSED:
        return FerryError(
            Reason.PERMISSION_MISSING,
            f"process {tracee.pid} may not make a userfaultfd: give its user read and write access to {DEVICE} (as the "
            "process sees it), or CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1",
        )
    if error.errno == errno.ENOSYS:
        return FerryError(
            Reason.USERFAULTFD_UNAVAILABLE,
            f"process {tracee.pid} has no userfaultfd(2): the kernel needs CONFIG_USERFAULTFD, and a seccomp profile "
            "must allow the call",
        )
    return FerryError(Reason.VMM_FAILED, f"process {tracee.pid} could not make a userfaultfd: {error.strerror}")
