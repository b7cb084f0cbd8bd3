"""Memory of a process, a memfd or a file, laid out page by page as a test wants it.

Run as a program it is the process: `held_memory.py PLAN`, one letter a page. It prints its memory's address, or the
number of its memfd, and holds it until its input ends.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Protocol

from pageferry.v1 import memory_pb2

PAGE = 4096
HOLE, ZERO, DATA, LATE, READ = "h", "z", "d", "l", "r"
"""A page never filled, filled with zeroes, full, zero but for its last byte, and read but never filled."""


def content(plan: str) -> bytes:
    return b"".join(page_content(kind, number) for number, kind in enumerate(plan))


def page_content(kind: str, number: int) -> bytes:
    if kind == DATA:
        return (number + 1).to_bytes(8, "little") * (PAGE // 8)
    if kind == LATE:
        return bytes(PAGE - 1) + b"\x01"
    return bytes(PAGE)


def fill(memory: mmap.mmap, plan: str) -> None:
    for number, kind in enumerate(plan):
        if kind == READ:
            memory[number * PAGE]
        elif kind != HOLE:
            memory[number * PAGE : (number + 1) * PAGE] = page_content(kind, number)


class Held(Protocol):
    """Memory that is held by somebody, and can be read from elsewhere."""

    pid: int

    def location(self, offset: int = 0) -> memory_pb2.MemoryLocation: ...

    def close(self) -> None: ...


class InProcess:
    """Private anonymous memory of a child."""

    def __init__(self, plan: str, how: str = "anonymous") -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__, how, plan], stdin=pipe, stdout=pipe)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        self.told = int(self.process.stdout.readline())

    def location(self, offset: int = 0) -> memory_pb2.MemoryLocation:
        return memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=self.told + offset))

    def tell(self) -> None:
        """Make the child go on, and wait until it has."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class InMemfd(InProcess):
    """A memfd of a child."""

    def __init__(self, plan: str) -> None:
        super().__init__(plan, "memfd")

    def location(self, offset: int = 0) -> memory_pb2.MemoryLocation:
        return memory_pb2.MemoryLocation(memfd=memory_pb2.MemfdMemory(fd=self.told, offset=offset))


class InFile:
    """A file that this process keeps open."""

    def __init__(self, plan: str, path: Path) -> None:
        self.pid = os.getpid()
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        self._let_go = weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, len(plan) * PAGE)
        for number, kind in enumerate(plan):
            if kind not in (HOLE, READ):
                os.pwrite(fd, page_content(kind, number), number * PAGE)

    def location(self, offset: int = 0) -> memory_pb2.MemoryLocation:
        return memory_pb2.MemoryLocation(file=memory_pb2.FileMemory(path=str(self.path), offset=offset))

    def close(self) -> None:
        self._let_go()
        self.path.unlink()


def main() -> None:
    import ctypes

    how, plan = sys.argv[1:]
    size = len(plan) * PAGE
    if how == "memfd":
        told = os.memfd_create("guest-memory")
        os.truncate(told, size)
        memory = mmap.mmap(told, size)
    else:
        private = mmap.MAP_PRIVATE if how == "anonymous" else mmap.MAP_SHARED
        memory = mmap.mmap(-1, size, flags=private | mmap.MAP_ANONYMOUS)
        # Pages of the size that the plan is made of, whatever the machine prefers.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        told = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fill(memory, plan)
    print(told, flush=True)
    if sys.stdin.readline():
        ctypes.CDLL(None).munmap(ctypes.c_void_p(told), ctypes.c_size_t(size))
        print("unmapped", flush=True)
        sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main()
