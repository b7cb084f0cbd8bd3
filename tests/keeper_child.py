"""A service that does with its descriptor store what a test asks for: python keeper_child.py CONTROL_SOCKET.

One JSON object a line comes over the control socket, and one goes back.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from pageferry.errors import FerryError
from pageferryd.linux.fd_store import FdStore

WATCHED = ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def memory(content: str) -> int:
    fd = os.memfd_create("kept", os.MFD_CLOEXEC)
    os.write(fd, content.encode())
    return fd


class Service:
    def __init__(self) -> None:
        self.address = os.environ.get("NOTIFY_SOCKET", "")
        self.before = watched()
        self.store = FdStore.from_environment(os.environ)
        self.mine: dict[str, int] = {}
        self.ends_with = 0
        signal.signal(signal.SIGTERM, self.terminate)

    def terminate(self, *_: object) -> None:
        self.store.stopping()
        sys.exit(self.ends_with)

    def environment(self) -> dict[str, Any]:
        return {"before": self.before, "after": watched(), "pid": os.getpid(), "available": self.store.available}

    def keep(self, name: str, content: str) -> None:
        self.mine[name] = memory(content)
        self.store.keep(name, self.mine[name])

    def keep_as_well(self, name: str, other_name: str) -> None:
        self.store.keep(other_name, self.mine[name])

    def write(self, name: str, content: str) -> None:
        os.pwrite(self.mine[name], content.encode(), 0)

    def take(self, name: str) -> list[dict[str, Any]]:
        return [
            {"content": os.pread(fd, 4096, 0).decode(), "inheritable": os.get_inheritable(fd)}
            for fd in self.store.take(name)
        ]

    def count(self, name: str) -> int:
        return len(self.store.take(name))

    def send(self, message: str, memories: int = 0, dead_pipe: bool = False) -> None:
        """Send a datagram as it is, with descriptors of memory, or of a pipe whose other end is closed."""
        fds = [memory(f"sent {number}") for number in range(memories)]
        if dead_pipe:
            reader, writer = os.pipe()
            os.close(writer)
            fds.append(reader)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(self.address)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sender.sendmsg([message.encode("latin-1")], rights)
        for fd in fds:
            os.close(fd)

    def ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with(self, code: int) -> None:
        self.ends_with = code


def watched() -> dict[str, str]:
    return {name: os.environ[name] for name in WATCHED if name in os.environ}


def serve(service: Service, control: socket.socket) -> None:
    own: dict[str, Callable[..., Any]] = {
        name: getattr(service, name)
        for name in (
            "environment", "keep", "keep_as_well", "write", "take", "count", "send", "ignore_sigterm", "end_with",
        )
    }  # fmt: skip
    for line in control.makefile("r"):
        request = json.loads(line)
        name = request.pop("do")
        if name == "exit":
            os._exit(request["code"])
        try:
            answer = {"answer": own.get(name, getattr(service.store, name, None))(**request)}
        except FerryError as error:
            answer = {"error": error.reason.value, "message": error.message}
        control.sendall(json.dumps(answer).encode() + b"\n")


def main() -> None:
    service = Service()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.connect(sys.argv[1])
        serve(service, control)


if __name__ == "__main__":
    main()
