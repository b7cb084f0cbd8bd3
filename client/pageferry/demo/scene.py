"""The stage of the demonstration: a temporary directory, and processes that end with it, whatever happens."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Self

_Made = TypeVar("_Made")

END_SECONDS: Final = 3.0
"""How long a process may take to end when asked, before it is killed."""
MOST_LOG_BYTES: Final = 8 * 1024 * 1024
_MOST_LINE_BYTES: Final = 1024 * 1024
# A Unix socket's path has at most 107 bytes, and the sockets lie two levels below.
_MOST_DIRECTORY_BYTES: Final = 48


async def together(first: Coroutine[Any, Any, _Made], second: Coroutine[Any, Any, _Made]) -> tuple[_Made, _Made]:
    """Await both at once. When one fails the other is cancelled, and the first error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(first), group.create_task(second)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return tasks[0].result(), tasks[1].result()


class Child:
    """One process. What it says goes to its log file, and each line of one of its streams to a listener too."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, gone: Reason) -> None:
        self.name = name
        self.log = log
        self.ended = False
        self._process = process
        self._gone = gone
        self._news = asyncio.Event()
        self._logged = 0
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def listen(self, stream: asyncio.StreamReader, hear: Callable[[bytes], None]) -> None:
        """Begin to read `stream`, line by line."""
        self._reader = asyncio.create_task(self._read(stream, hear))

    async def _read(self, stream: asyncio.StreamReader, hear: Callable[[bytes], None]) -> None:
        try:
            # Unbuffered, so that what the process itself appends stays in order. A line to a local file is no wait.
            with self.log.open("ab", buffering=0) as log:  # noqa: ASYNC230
                while line := await stream.readline():
                    if self._logged < MOST_LOG_BYTES:
                        self._logged += log.write(line)
                    hear(line)
                    self._news.set()
        finally:
            self.ended = True
            self._news.set()

    async def until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something that this process says makes `holds()` true; `what` says what is waited for."""
        try:
            async with asyncio.timeout(seconds):
                while not holds():
                    if self.ended:
                        raise FerryError(self._gone, f"{self.name} ended while waiting for {what}; see its log")
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError:
            raise FerryError(self._gone, f"{self.name}: waited {seconds:g} s for {what} in vain") from None

    async def say(self, word: str) -> None:
        """Write one line to its stdin."""
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError(f"{self.name} was started without a stdin")
        try:
            stdin.write(word.encode() + b"\n")
            await stdin.drain()
        except ConnectionError as error:
            raise FerryError(self._gone, f"{self.name} ended before it could be told to {word}; see its log") from error

    async def exited(self, seconds: float) -> bool:
        """Wait for its end; tell whether it came in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def end(self) -> None:
        """Ask it to end, kill it when it does not, and collect it."""
        if self._process.returncode is None:
            self._process.terminate()
            if not await self.exited(END_SECONDS):
                self._process.kill()
                await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._reader is not None:
            # A grandchild might hold the pipe open: the reading ends with the process.
            await asyncio.wait([self._reader], timeout=1.0)
            self._reader.cancel()

    def last_words(self, lines: int = 12) -> list[str]:
        """Return the last lines of its log, without those that a guest says several times a second."""
        if not self.log.exists():
            return []
        said = self.log.read_text(errors="replace").splitlines()
        return [line for line in said if '"event": "progress"' not in line][-lines:]


class Scene:
    """The directory and its processes: an asynchronous context manager that leaves nothing behind but, with `keep`,
    the directory.
    """  # noqa: D205

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self.directory = Path()
        self.children: list[Child] = []

    async def __aenter__(self) -> Self:
        """Make the directory."""
        parent = tempfile.gettempdir()
        self.directory = Path(
            tempfile.mkdtemp(
                prefix="pageferry-",
                dir=parent if len(os.fsencode(parent)) <= _MOST_DIRECTORY_BYTES else "/tmp",  # noqa: S108
            )
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process, the last one first, and remove the directory."""
        for child in reversed(self.children):
            await child.end()
        if not self.keep:
            shutil.rmtree(self.directory)

    async def spawn_python(
        self, name: str, arguments: Sequence[str], hear: Callable[[bytes], None], *, heard: str, gone: Reason
    ) -> Child:
        """Start `python ARGUMENTS`, listening to its stream `heard`, "stdout" or "stderr".

        `gone` is the reason of the error when it ends, or says nothing, while it is waited for.
        """
        log = self.directory / f"{name}.log"
        with log.open("ab") as rest:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if heard == "stdout" else rest,
                stderr=asyncio.subprocess.PIPE if heard == "stderr" else rest,
                # Modules come from the installation, not from where the person happens to stand.
                cwd=self.directory,
                env=_environment(),
                # Ctrl-C at the terminal is for the demonstration, which then ends its processes in order.
                start_new_session=True,
                limit=_MOST_LINE_BYTES,
            )
        child = Child(name, process, log, gone)
        self.children.append(child)
        stream = process.stdout if heard == "stdout" else process.stderr
        if stream is None:
            raise RuntimeError(f"{name} was started without a pipe for its {heard}")
        child.listen(stream, hear)
        return child


def _environment() -> dict[str, str]:
    """Return the environment without settings that were meant for other sidecars of this machine."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("PAGEFERRY_")}
