"""The userfaultfd ABI: constants and struct formats of linux/userfaultfd.h (Linux 6.18), and nothing else.

Read beside the man pages userfaultfd(2) and ioctl_userfaultfd(2). Structs are in native byte order without padding of
their own; integers are the kernel's __u64 and __s64.
"""

from __future__ import annotations

import platform
from struct import Struct
from typing import Final


def _ioc(direction: int, number: int, size: int) -> int:
    """Return an ioctl number as _IOC of asm-generic/ioctl.h builds it, for the type 0xAA of userfaultfd."""
    return direction << 30 | size << 16 | 0xAA << 8 | number


def _iowr(number: int, argument: Struct) -> int:
    return _ioc(3, number, argument.size)


def _ior(number: int, argument: Struct) -> int:
    return _ioc(2, number, argument.size)


API: Final = Struct("=QQQ")
"""struct uffdio_api: api, features, ioctls."""
RANGE: Final = Struct("=QQ")
"""struct uffdio_range: start, len."""
REGISTER: Final = Struct("=QQQQ")
"""struct uffdio_register: range.start, range.len, mode, ioctls (out)."""
COPY: Final = Struct("=QQQQq")
"""struct uffdio_copy: dst, src, len, mode, copy (out: bytes done, or a negative errno)."""
ZEROPAGE: Final = Struct("=QQQq")
"""struct uffdio_zeropage: range.start, range.len, mode, zeropage (out, as in COPY)."""
CONTINUE: Final = Struct("=QQQq")
"""struct uffdio_continue: range.start, range.len, mode, mapped (out, as in COPY)."""
POISON: Final = Struct("=QQQq")
"""struct uffdio_poison: range.start, range.len, mode, updated (out, as in COPY)."""
MSG: Final = Struct("=B7xQQQ")
"""struct uffd_msg: event, then its three words. PAGEFAULT: flags, address, thread id in the low 32 bits. FORK: the new
fd in the low 32 bits. REMAP: from, to, length. REMOVE and UNMAP: start, end."""
UFFD_MSG_SIZE: Final = 32

UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
USERFAULTFD_IOC_NEW: Final = _ioc(0, 0x00, 0)
"""ioctl on /dev/userfaultfd; its argument is the flags of userfaultfd(2)."""
NR_USERFAULTFD: Final = 282 if platform.machine() == "aarch64" else 323
"""Number of userfaultfd(2): asm-generic/unistd.h on aarch64, syscall_64.tbl on x86_64."""

UFFDIO_REGISTER: Final = _iowr(0x00, REGISTER)
UFFDIO_UNREGISTER: Final = _ior(0x01, RANGE)
UFFDIO_WAKE: Final = _ior(0x02, RANGE)
UFFDIO_COPY: Final = _iowr(0x03, COPY)
UFFDIO_ZEROPAGE: Final = _iowr(0x04, ZEROPAGE)
UFFDIO_CONTINUE: Final = _iowr(0x07, CONTINUE)
UFFDIO_POISON: Final = _iowr(0x08, POISON)
UFFDIO_API: Final = _iowr(0x3F, API)

UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2
UFFDIO_COPY_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_CONTINUE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_POISON_MODE_DONTWAKE: Final = 1 << 0

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6
UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_THREAD_ID: Final = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS: Final = 1 << 9
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_POISON: Final = 1 << 14
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
UFFD_FEATURE_MOVE: Final = 1 << 16

UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16

UFFD_PAGEFAULT_FLAG_WRITE: Final = 1 << 0
UFFD_PAGEFAULT_FLAG_WP: Final = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR: Final = 1 << 2
