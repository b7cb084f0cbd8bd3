"""Another process that sets bits of a shared bitmap, as a VMM does, while this one clears others.

Run as `other_side.py FD WORDS ROUNDS`. The even bits are its own: it sets each in turn, `ROUNDS` times over, and counts
those that were not clear when it began, or not set when it looked again. This file is also the test's end of that.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

# In x86-64: lock or [rdi], rsi, and return.
_OR = bytes.fromhex("f0 48 09 37 c3")
# The same with and.
_AND = bytes.fromhex("f0 48 21 37 c3")


class OtherSide:
    """The child."""

    def __init__(self, fd: int, words: int, rounds: int) -> None:
        command = [sys.executable, __file__, str(fd), str(words), str(rounds)]
        self._process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def lost(self) -> int:
        """Wait for its end; return how many of its bits were lost."""
        output, _ = self._process.communicate(timeout=30)
        return int(output)


def main() -> None:
    fd, words, rounds = map(int, sys.argv[1:])
    bits = mmap.mmap(fd, words * 8)
    address = ctypes.addressof(ctypes.c_char.from_buffer(bits))
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_OR + _AND)
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)
    set_bits, clear_bits = kind(at), kind(at + len(_OR))
    print("ready", flush=True)
    sys.stdin.readline()
    lost = 0
    for number in range(rounds):
        word = address + 8 * (number % words)
        bit = 1 << 2 * (number % 32)
        set_bits(word, bit)
        lost += not ctypes.c_uint64.from_address(word).value & bit
        clear_bits(word, ~bit & (1 << 64) - 1)
        lost += bool(ctypes.c_uint64.from_address(word).value & bit)
    print(lost)


if __name__ == "__main__":
    main()
