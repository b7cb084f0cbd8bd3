"""A process that the sidecar has started, and that outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Self

from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MOST_OUTPUT = 1 << 20
"""Bytes of output after which all but the last are dropped, at the next look."""
_KEPT_OUTPUT = 64 << 10
_TAIL = 400
_END_SECONDS = 1.0
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Launched:
    """One process, leader of a session and a process group of its own; what it says goes to the file `output`.

    Not a subprocess of asyncio's: those are killed with their event loop. The output is no pipe for the same reason.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        """Take a process that nobody else waits for."""
        self.pid = process.pid
        self._process = process
        self._output = output
        self._pidfd = PidFd(process.pid)
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd.fileno(), self._reap)

    @classmethod
    async def start(cls, command: Sequence[str], output: Path) -> Self:
        """Start the program, without a shell. FerryError(VMM_FAILED) where it cannot be."""
        starting = asyncio.ensure_future(asyncio.to_thread(_popen, command, output))
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It cannot be told to stop any more.
            with contextlib.suppress(OSError):
                started = cls(await starting, output)
                started.kill()
                await started.wait(_END_SECONDS)
                started.close()
            raise
        except OSError as error:
            raise FerryError(
                Reason.VMM_FAILED, f"{command[0]} cannot be started: {error.strerror}; correct the template's command"
            ) from error
        return cls(process, output)

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal, or None while it runs."""
        return self._process.returncode

    async def wait(self, seconds: float) -> bool:
        """Wait at most so long for its end; return whether it has ended."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        """Kill it and all of its group, unless it has ended: its id may then be another's. Raises OSError."""
        if self.status is None:
            os.killpg(self.pid, signal.SIGKILL)

    def tail(self) -> str:
        """Return the end of what it said, as one printable line of at most a few hundred characters."""
        try:
            with self._output.open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
                text = file.read(_TAIL).decode(errors="replace")
        except FileNotFoundError:
            return ""
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())

    def trim(self) -> None:
        """Drop the older part of an output that has grown long."""
        try:
            with self._output.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size <= MOST_OUTPUT:
                    return
                file.seek(size - _KEPT_OUTPUT)
                kept = file.read(_KEPT_OUTPUT)
            os.truncate(self._output, 0)
            _append(self._output, kept)
        except FileNotFoundError:
            return

    def close(self) -> None:
        """Let it go: it is not touched. One that has ended leaves no output."""
        if self._pidfd.fileno() >= 0:
            self._loop.remove_reader(self._pidfd.fileno())
        self._pidfd.close()
        if self.status is not None:
            self._output.unlink(missing_ok=True)
        else:
            # It goes on as a child of this process, or of another once this one has ended.
            self._process.returncode = 0

    def _reap(self) -> None:
        if self._process.poll() is not None:
            self._loop.remove_reader(self._pidfd.fileno())
            self._ended.set()


def _popen(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    output.unlink(missing_ok=True)
    opened = os.open(output, _APPEND | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened, start_new_session=True)
    except BaseException:
        output.unlink()
        raise
    finally:
        os.close(opened)


def _append(path: Path, content: bytes) -> None:
    opened = os.open(path, _APPEND)
    try:
        os.write(opened, content)
    finally:
        os.close(opened)
