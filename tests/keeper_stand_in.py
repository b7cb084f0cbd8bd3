"""A manager that stands in for systemd: it stores descriptors, the newest first, and starts keeper_child.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

from keeper_control import DEADLINE, TESTS, Control, Incarnation

_STOP = b"X_STOP=1"


class StandInManager:
    """Listens at `address`, a path or "@" and an abstract name. With `deaf` it answers no barrier."""

    def __init__(
        self, address: str, capacity: int = 4096, control: Control | None = None, *, deaf: bool = False
    ) -> None:
        self.address = address
        self.messages: list[bytes] = []
        self.stored: list[tuple[str, int]] = []
        self._capacity = capacity
        self._control = control
        self._deaf = deaf
        self._unanswered: list[int] = []
        self._service: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._kernel_address())
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def first(self) -> Incarnation:
        assert self._control is not None
        self.synchronise()
        fds = [fd for _, fd in self.stored]
        self._service = subprocess.Popen(
            [
                *(sys.executable, str(TESTS / "keeper_launch.py"), ",".join(map(str, fds))),
                *(":".join(name for name, _ in self.stored), *self._control.command),
            ],
            pass_fds=fds,
            env={**os.environ, "NOTIFY_SOCKET": self.address, "FDSTORE": str(self._capacity)},
        )
        return self._control.accept()

    def next(self) -> Incarnation:
        assert self._service is not None
        self._service.wait(DEADLINE)
        return self.first()

    def _kernel_address(self) -> str:
        return "\0" + self.address[1:] if self.address.startswith("@") else self.address

    def synchronise(self) -> None:
        """Wait until all that was sent before has been gone through."""
        reader, writer = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(self._kernel_address())
            socket.send_fds(sender, [b"BARRIER=1"], [writer])
        os.close(writer)
        assert os.read(reader, 1) == b""
        os.close(reader)
        self.messages.pop()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 253)
            if data == _STOP:
                return
            self.messages.append(data)
            self._do(data.decode().split("\n"), fds)

    def _do(self, tags: list[str], fds: list[int]) -> None:
        name = next((tag.removeprefix("FDNAME=") for tag in tags if tag.startswith("FDNAME=")), "stored")
        if "FDSTOREREMOVE=1" in tags:
            for entry in [entry for entry in self.stored if entry[0] == name]:
                os.close(entry[1])
                self.stored.remove(entry)
        for fd in fds:
            known = any(os.path.sameopenfile(fd, other) for _, other in self.stored)
            if self._deaf and "BARRIER=1" in tags:
                self._unanswered.append(fd)
            elif "FDSTORE=1" in tags and len(self.stored) < self._capacity and not known:
                self.stored.insert(0, (name, fd))
            else:
                os.close(fd)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(_STOP, self._kernel_address())
        self._thread.join(DEADLINE)
        self._socket.close()
        if not self.address.startswith("@"):
            Path(self.address).unlink()
        for fd in [*self._unanswered, *(fd for _, fd in self.stored)]:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._service is not None:
            self._service.kill()
            self._service.wait(DEADLINE)
