"""Open a userfaultfd on the VMM's side: with the right features, over the right range. See userfaultfd(2)."""

from __future__ import annotations

import fcntl

from pageferry import userfaultfd
from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason

OPTIONAL_FEATURES = abi.UFFD_FEATURE_THREAD_ID | abi.UFFD_FEATURE_EVENT_UNMAP | abi.UFFD_FEATURE_EVENT_REMAP
"""Asked for where the kernel has them: the pager reports better with them, and is right without."""


def open_userfaultfd(required: int, *, user_mode_only: bool = False) -> int:
    """Return a close-on-exec, non-blocking userfaultfd with the UFFD_FEATURE_* bits `required` and the optional ones.

    `user_mode_only` descriptors need no privilege, but do not see faults of the kernel (read(2) into guest memory, a
    vCPU): such accesses fail. FerryError: USERFAULTFD_UNAVAILABLE, or PERMISSION_MISSING with the remedy.
    """
    required |= abi.UFFD_FEATURE_EVENT_REMOVE
    return userfaultfd.open_userfaultfd(required, optional=OPTIONAL_FEATURES, user_mode_only=user_mode_only)


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
