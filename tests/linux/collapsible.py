"""A process with memory that it has filled page by page; it serves tests of what the kernel does with its mappings.

Run as `collapsible.py BYTES BACKING`: says where its memory lies, then answers each line with the sum of its bytes.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

from pageferry.vmm.memory import Backing, GuestMemory

PAGE = 4096


class Collapsible:
    """The child, and the span of its memory."""

    def __init__(self, size: int, backing: Backing = Backing.ANONYMOUS) -> None:
        command = [sys.executable, __file__, str(size), backing.value]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.pid = self.process.pid
        self.span = (int(self.process.stdout.readline()), size)

    def is_intact(self) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline() == b"intact\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()


def page(number: int) -> bytes:
    return (number + 1).to_bytes(8, "little") * (PAGE // 8)


def main() -> None:
    size, backing = int(sys.argv[1]), Backing(sys.argv[2])
    memory = GuestMemory(size, backing)
    for at in range(0, size, PAGE):
        memory.write(at, page(at // PAGE))
    print(memory.address, flush=True)
    for _ in sys.stdin:
        intact = all(memory.read(at, PAGE) == page(at // PAGE) for at in range(0, size, PAGE))
        print("intact" if intact else "spoilt", flush=True)


if __name__ == "__main__":
    main()
