"""Tuning of the C library's malloc for a process that moves big messages all day."""

from __future__ import annotations

import ctypes

# malloc.h of glibc.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_MIB = 1 << 20


def tune_malloc() -> bool:
    """Make malloc keep freed messages instead of giving each back to the kernel; call once, at the start.

    By default glibc maps every big message afresh and unmaps it after, so that each of its pages is zeroed and faulted
    again. Return whether all settings took: False on a C library without mallopt (musl), which is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    # 32 MiB is the most that glibc takes as M_MMAP_THRESHOLD on 64 bits (HEAP_MAX_SIZE / 2).
    settings = ((_M_MMAP_THRESHOLD, 32 * _MIB), (_M_TRIM_THRESHOLD, 64 * _MIB), (_M_TOP_PAD, 4 * _MIB))
    taken = [mallopt(option, value) == 1 for option, value in settings]
    return all(taken)
