"""Atomic operations on memory that another process changes too. Python has none, and libc exports none."""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import cache

from pageferry.errors import FerryError, Reason

# x86-64, System V calling convention: lock and [rdi], rsi; ret. The lock prefix makes it a full barrier, which is more
# than the store-release that the reader of the word needs.
_X86_64 = bytes.fromhex("f0 48 21 37 c3")
# aarch64 with LSE (ARMv8.1): mvn x1, x1; ldclral x1, x1, [x0]; ret.
_AARCH64 = bytes.fromhex("e1 03 21 aa 01 10 e1 f8 c0 03 5f d6")
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
        self._pages = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._pages.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        # Never writable and executable at once.
        _mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
        self.word = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)(address)


@cache
def atomic_and() -> AtomicAnd:
    """Return the one for this process."""
    return AtomicAnd()


def _mprotect(address: int, size: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, size, protection):
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"may not make memory executable (errno {ctypes.get_errno()}), which userfault bitmaps need: a system call "
            "filter or MemoryDenyWriteExecute forbids it",
        )
