"""The test's side of services that a manager starts: keeper_child.py, one incarnation after another."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

DEADLINE = 20.0
TESTS = Path(__file__).parent


class Incarnation:
    """One running keeper_child.py."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines = control.makefile("r")
        credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid: int = struct.unpack("=iII", credentials)[0]
        self._handle = -1

    def try_to(self, do: str, **values: Any) -> dict[str, Any]:
        """Have it do something; return the answer or the error."""
        self._control.sendall(json.dumps({"do": do, **values}).encode() + b"\n")
        found: dict[str, Any] = json.loads(self._lines.readline())
        return found

    def ask(self, do: str, **values: Any) -> Any:
        found = self.try_to(do, **values)
        assert "error" not in found, found
        return found["answer"]

    def contents(self, name: str) -> list[str]:
        """Take the descriptors of a name and return what the memory holds."""
        return [found["content"] for found in self.ask("take", name=name)]

    def end(self, code: int) -> None:
        """Have it end; return once it has."""
        self._control.sendall(json.dumps({"do": "exit", "code": code}).encode() + b"\n")
        self.wait()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal that ends it; return once it has ended."""
        signal.pidfd_send_signal(self._pidfd(), number)
        self.wait()

    def wait(self) -> None:
        assert self._lines.read() == ""

    def _pidfd(self) -> int:
        if self._handle < 0:
            self._handle = os.pidfd_open(self.pid)
        return self._handle

    def close(self) -> None:
        self._lines.close()
        self._control.close()
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


class Control:
    """Where incarnations report."""

    def __init__(self, path: Path) -> None:
        self.command = [sys.executable, str(TESTS / "keeper_child.py"), str(path)]
        self._incarnations: list[Incarnation] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(DEADLINE)
        self._listener.bind(str(path))
        self._listener.listen()

    def accept(self) -> Incarnation:
        connection, _ = self._listener.accept()
        connection.settimeout(DEADLINE)
        self._incarnations.append(Incarnation(connection))
        return self._incarnations[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()

    def end_all(self) -> None:
        """End all incarnations: one that still runs ends when its control socket does. Doing so twice does nothing."""
        self._listener.close()
        for incarnation in self._incarnations:
            incarnation.close()


class Manager(Protocol):
    """What starts services and stores their descriptors."""

    def first(self) -> Incarnation:
        """Return the service, started."""

    def next(self) -> Incarnation:
        """Return the service after the one that ended."""


@contextmanager
def controlled(directory: Path) -> Iterator[Control]:
    with Control(directory / "control.sock") as control:
        yield control
