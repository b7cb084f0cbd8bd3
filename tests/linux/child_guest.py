"""A guest in a process of its own: hands its userfaultfd over, then does to its memory what it is told, line by line.

Run as `child_guest.py SOCKET_FD PAGES FEATURES`. It sends its memory's address with the descriptor, and answers every
command with one line, when it is done. This file is also the test's end of that.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

from pageferry.vmm.memory import GuestMemory
from pageferryd.linux.unix_peer import recv_with_fds
from pageferryd.linux.userfaultfd import Userfaultfd

PAGE = 4096
DEADLINE = 10.0


class ChildGuest:
    """A child with `pages` of memory under a userfaultfd, which is adopted as `uffd`."""

    def __init__(self, pages: int, features: int = 0) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        here.settimeout(DEADLINE)
        command = [sys.executable, __file__, str(there.fileno()), str(pages), str(features)]
        self.process = subprocess.Popen(command, pass_fds=[there.fileno()])
        there.close()
        self._socket = here
        received = recv_with_fds(here, 64, 1)
        self.address = int(received.data)
        self.uffd = Userfaultfd.adopt(received.fds[0])

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def tell(self, *command: object) -> None:
        self._socket.sendall(" ".join(map(str, command)).encode() + b"\n")

    def answer(self) -> str:
        return self._socket.recv(4096).decode().strip()

    def ask(self, *command: object) -> str:
        self.tell(*command)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self.uffd.close()
        self._socket.close()


def main() -> None:
    commands = socket.socket(fileno=int(sys.argv[1]))
    memory = GuestMemory(int(sys.argv[2]) * PAGE)
    uffd = Userfaultfd.open(int(sys.argv[3]))
    uffd.register(memory.address, memory.size)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd.fileno()]))
    commands.sendmsg([str(memory.address).encode()], [rights])
    with commands.makefile("r") as lines:
        for line in lines:
            commands.sendall(do(memory, *line.split()).encode() + b"\n")


def do(memory: GuestMemory, what: str, page: str) -> str:
    offset = int(page) * PAGE
    if what == "read":
        return memory.read(offset, 16).hex()
    if what == "discard":
        memory.discard(offset, PAGE)
        return "done"
    if what == "fork":
        return read_in_fork(memory, offset)
    raise ValueError(what)


def read_in_fork(memory: GuestMemory, offset: int) -> str:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, memory.read(offset, 16))
        os._exit(0)
    os.close(writing)
    content = os.read(reading, 16)
    os.waitpid(child, 0)
    return content.hex()


if __name__ == "__main__":
    main()
