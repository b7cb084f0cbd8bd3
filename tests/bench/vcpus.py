"""The native threads of the doors' benchmark (vcpus.c), compiled where the benchmark runs, and called from Python."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LIBRARY = "vcpus.so"
_SOURCE = Path(__file__).with_name("vcpus.c")
_COMPILE = ("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")


class _Door(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("connection", ctypes.c_int),
        ("pagemap", ctypes.c_int),
    )


def build(directory: Path) -> None:
    """Compile the threads' code into LIBRARY there, which Vcpus loads."""
    try:
        subprocess.run([*_COMPILE, "-o", str(directory / LIBRARY), str(_SOURCE)], check=True)
    except FileNotFoundError:
        sys.exit("this benchmark compiles its guest's threads: install gcc")


class Vcpus:
    """Threads that touch memory at `memory`, each page of which begins with its number.

    With `bits`, the address of a userfault bitmap, they forward their faults on `connection`; else the touch is all.
    """

    def __init__(self, library: Path, memory: int, bits: int | None = None, connection: int = -1) -> None:
        self._touch = ctypes.CDLL(str(library)).touch_pages
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY) if bits is None else -1
        # A copy, since the pager's end may come while they wait: this number must not become another file's.
        copy = os.dup(connection) if connection >= 0 else -1
        self._door = _Door(memory, bits, copy, pagemap)

    def touch(self, pages: Sequence[int], count: int, threads: int) -> tuple[list[float], float, int]:
        """Touch `count` of the pages that are missing, or as many as there are.

        Return the microseconds of each, the seconds of all, and how many of the pages were looked at.
        """
        each = count // threads
        taken = (ctypes.c_uint64 * (each * threads))()
        used, elapsed = ctypes.c_uint64(), ctypes.c_uint64()
        failure = self._touch(
            ctypes.byref(self._door),
            (ctypes.c_uint64 * len(pages))(*pages),
            ctypes.c_uint64(len(pages)),
            ctypes.c_uint32(threads),
            ctypes.c_uint64(each),
            taken,
            ctypes.byref(used),
            ctypes.byref(elapsed),
        )
        if failure:
            raise OSError(failure, os.strerror(failure))
        return [round(one / 1000, 1) for one in taken if one], elapsed.value / 1e9, used.value
