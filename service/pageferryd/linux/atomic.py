"""Atomic operations on memory that another process changes too. Python has none, and libc exports none."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from functools import cache

from pageferry.errors import FerryError, Reason

# x86-64, System V calling convention: lock and [rdi], rsi; ret. The lock prefix makes it a full barrier, which is more
# than the store-release that the reader of the word needs.
_X86_64 = bytes.fromhex("f0 48 21 37 c3")
# aarch64 with LSE (ARMv8.1): mvn x1, x1; ldclral x1, x1, [x0]; ret.
_AARCH64 = bytes.fromhex("e1 03 21 aa 01 10 e1 f8 c0 03 5f d6")
_MAP_FAILED = ctypes.c_void_p(-1).value
_CODE = {"x86_64": _X86_64, "aarch64": _AARCH64}


class AtomicAnd:
    """`word(address, mask)`: the 64-bit word at an aligned address becomes itself AND mask, for everybody at once."""

    def __init__(self) -> None:
        """Raise FerryError(USERFAULTFD_UNAVAILABLE) on a machine that this was not written for."""
        code = _CODE.get(platform.machine())
        if code is None:
            raise FerryError(
                Reason.USERFAULTFD_UNAVAILABLE,
                f"userfault bitmaps need atomic operations that pageferry does not know on {platform.machine()}",
            )
        self._code = _executable(code)
        self.word = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)(self._code)


@cache
def atomic_and() -> AtomicAnd:
    """Return the one for this process."""
    return AtomicAnd()


def _executable(code: bytes) -> int:
    """Return the address of code that this process may run, and never write.

    Written to a file first: no memory is ever writable and executable, nor becomes executable, which systemd's
    MemoryDenyWriteExecute forbids. It stays for as long as the process does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    fd = os.memfd_create("pageferryd-atomic", os.MFD_CLOEXEC)
    try:
        os.write(fd, code)
        address = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
    finally:
        os.close(fd)
    if address is None or address == _MAP_FAILED:
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"may not run code of its own ({os.strerror(ctypes.get_errno())}), which userfault bitmaps need: a system "
            "call filter or security module forbids executable mappings of a memfd",
        )
    return int(address)
