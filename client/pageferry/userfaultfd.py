"""How a userfaultfd comes to be, and which features the kernel's has: userfaultfd(2), UFFDIO_API."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Mapping

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason

DEVICE = "/dev/userfaultfd"

FEATURE_NAMES: Mapping[int, str] = {
    value: name.removeprefix("UFFD_FEATURE_") for name, value in vars(abi).items() if name.startswith("UFFD_FEATURE_")
}

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int]
_syscall.restype = ctypes.c_long


def feature_names(features: int) -> list[str]:
    """Return the names of UFFD_FEATURE_* bits, as `EVENT_REMOVE`; a bit without a name as `1<<n`."""
    bits = [bit for bit in range(64) if features >> bit & 1]
    return [FEATURE_NAMES.get(1 << bit, f"1<<{bit}") for bit in bits]


def offered_features() -> int:
    """Return the UFFD_FEATURE_* bits that this kernel offers. FerryError as in `open_userfaultfd`."""
    # A descriptor for faults of user space alone offers the same, and needs no privilege.
    uffd = new_userfaultfd(user_mode_only=True)
    try:
        return _agree(uffd, 0)
    finally:
        os.close(uffd)


def open_userfaultfd(features: int, *, optional: int = 0, user_mode_only: bool) -> int:
    """Return a close-on-exec, non-blocking userfaultfd with the UFFD_FEATURE_* bits asked for.

    Of `optional` it has those that the kernel offers. FerryError: USERFAULTFD_UNAVAILABLE where the kernel has no
    userfaultfd or lacks a feature, PERMISSION_MISSING.
    """
    uffd = new_userfaultfd(user_mode_only=user_mode_only)
    try:
        agree(uffd, features, optional=optional)
    except BaseException:
        os.close(uffd)
        raise
    return uffd


def agree(uffd: int, features: int, *, optional: int = 0) -> None:
    """Agree on the API of a new userfaultfd, whichever process made it, with features as in `open_userfaultfd`."""
    # UFFDIO_API refuses unknown features without naming them, and is called once a descriptor: so another is asked.
    offered = offered_features()
    missing = features & ~offered
    if missing:
        names = ", ".join(feature_names(missing))
        raise FerryError(
            Reason.USERFAULTFD_UNAVAILABLE, f"this kernel's userfaultfd lacks {names}; a newer kernel has it"
        )
    _agree(uffd, features | optional & offered)


def new_userfaultfd(*, user_mode_only: bool) -> int:
    """Return a userfaultfd on which no API has been agreed yet, from the device or else by the system call."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # No device before Linux 6.1, or no permission on it: the system call may still do, or says why not.
        return _by_system_call(flags)
    try:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    except OSError as error:
        raise FerryError(Reason.USERFAULTFD_UNAVAILABLE, f"{DEVICE} gave no userfaultfd: {error}") from error
    finally:
        os.close(device)


def _by_system_call(flags: int) -> int:
    uffd: int = _syscall(abi.NR_USERFAULTFD, flags)
    if uffd >= 0:
        return uffd
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.EACCES):
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"userfaultfd(2) is not permitted: give this user read and write access to {DEVICE}, or CAP_SYS_PTRACE, "
            "or set the sysctl vm.unprivileged_userfaultfd to 1",
        )
    raise FerryError(
        Reason.USERFAULTFD_UNAVAILABLE,
        f"userfaultfd(2) failed: {os.strerror(number)}; the kernel needs CONFIG_USERFAULTFD (Linux 5.11 or newer), and "
        "a container's seccomp profile must allow the call",
    )


def _agree(uffd: int, features: int) -> int:
    """Agree on the API with these features; return all that the kernel offers."""
    argument = bytearray(abi.API.pack(abi.UFFD_API, features, 0))
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_API, argument)
    except PermissionError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING, "the userfaultfd feature EVENT_FORK needs CAP_SYS_PTRACE: run with it"
        ) from error
    except OSError as error:
        names = ", ".join(feature_names(features)) or "none"
        raise FerryError(
            Reason.USERFAULTFD_UNAVAILABLE,
            f"this kernel's userfaultfd refused the features asked for ({names}): {error}",
        ) from error
    offered: int = abi.API.unpack(argument)[1]
    return offered
