"""Open a userfaultfd on the VMM's side: with the right features, over the right range. See userfaultfd(2)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason

DEVICE = "/dev/userfaultfd"

OPTIONAL_FEATURES = abi.UFFD_FEATURE_THREAD_ID | abi.UFFD_FEATURE_EVENT_UNMAP | abi.UFFD_FEATURE_EVENT_REMAP
"""Asked for where the kernel has them: the pager reports better with them, and is right without."""

_FEATURE_NAMES = {
    abi.UFFD_FEATURE_EVENT_REMOVE: "EVENT_REMOVE (Linux 4.11: without it discarded pages would come back)",
    abi.UFFD_FEATURE_MISSING_SHMEM: "MISSING_SHMEM (Linux 4.11)",
    abi.UFFD_FEATURE_MISSING_HUGETLBFS: "MISSING_HUGETLBFS (Linux 4.11)",
    abi.UFFD_FEATURE_MINOR_HUGETLBFS: "MINOR_HUGETLBFS (Linux 5.13)",
    abi.UFFD_FEATURE_MINOR_SHMEM: "MINOR_SHMEM (Linux 5.14)",
}

_libc = ctypes.CDLL(None, use_errno=True)


def open_userfaultfd(required: int, *, user_mode_only: bool = False) -> int:
    """Return a close-on-exec, non-blocking userfaultfd with the UFFD_FEATURE_* bits `required` and the optional ones.

    `user_mode_only` descriptors need no privilege, but do not see faults of the kernel (read(2) into guest memory, a
    vCPU): such accesses fail. FerryError: USERFAULTFD_UNAVAILABLE, or PERMISSION_MISSING with the remedy.
    """
    required |= abi.UFFD_FEATURE_EVENT_REMOVE
    uffd = _new(user_mode_only=user_mode_only)
    try:
        # UFFDIO_API refuses a feature that it lacks, and can be called once: a first descriptor is spent on asking.
        offered = _agree(uffd, 0)
    finally:
        os.close(uffd)
    missing = [name for bit, name in _FEATURE_NAMES.items() if bit & required & ~offered]
    if missing:
        raise FerryError(Reason.USERFAULTFD_UNAVAILABLE, f"this kernel's userfaultfd lacks {', '.join(missing)}")
    uffd = _new(user_mode_only=user_mode_only)
    try:
        _agree(uffd, required | OPTIONAL_FEATURES & offered)
    except BaseException:
        os.close(uffd)
        raise
    return uffd


def register_missing(uffd: int, address: int, length: int, *, minor: bool = False) -> None:
    """Make faults on missing pages of the range wait for `uffd`. Bytes, page-aligned; the range should be untouched.

    With `minor`, those on pages that its file has, but the mapping has not, wait too.
    """
    mode = abi.UFFDIO_REGISTER_MODE_MISSING | (abi.UFFDIO_REGISTER_MODE_MINOR if minor else 0)
    argument = bytearray(abi.REGISTER.pack(address, length, mode, 0))
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_REGISTER, argument)
    except OSError as error:
        raise FerryError(
            Reason.USERFAULTFD_REFUSED,
            f"the kernel refused a userfaultfd over {length} bytes at {address:#x}: {error}",
        ) from error


def unregister(uffd: int, address: int, length: int) -> None:
    """Take the range back from `uffd`. Only while no guest depends on it: its missing pages read as zeroes from now."""
    fcntl.ioctl(uffd, abi.UFFDIO_UNREGISTER, bytearray(abi.RANGE.pack(address, length)))


def _new(*, user_mode_only: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # No device before Linux 6.1, or no permission on it: the system call may still do, or says why not.
        return _new_by_syscall(flags)
    try:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    except OSError as error:
        raise FerryError(Reason.USERFAULTFD_UNAVAILABLE, f"{DEVICE} gave no userfaultfd: {error}") from error
    finally:
        os.close(device)


def _new_by_syscall(flags: int) -> int:
    uffd = int(_libc.syscall(ctypes.c_long(abi.NR_USERFAULTFD), ctypes.c_int(flags)))
    if uffd >= 0:
        return uffd
    number = ctypes.get_errno()
    if number == errno.EPERM:
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"userfaultfd(2) is not permitted: give this user access to {DEVICE}, or CAP_SYS_PTRACE, or set the sysctl "
            "vm.unprivileged_userfaultfd to 1",
        )
    raise FerryError(
        Reason.USERFAULTFD_UNAVAILABLE,
        f"userfaultfd(2) failed: {os.strerror(number)}; the kernel needs CONFIG_USERFAULTFD, and a container's seccomp "
        "profile must allow it",
    )


def _agree(uffd: int, features: int) -> int:
    """Agree on the API; return the features that the kernel offers."""
    argument = bytearray(abi.API.pack(abi.UFFD_API, features, 0))
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_API, argument)
    except OSError as error:
        raise FerryError(
            Reason.USERFAULTFD_UNAVAILABLE, f"this kernel's userfaultfd refused features {features:#x}: {error}"
        ) from error
    offered: int = abi.API.unpack(argument)[1]
    return offered
