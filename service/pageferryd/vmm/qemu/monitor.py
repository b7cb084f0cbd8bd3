"""QEMU's monitor: QMP over a Unix socket (docs/interop/qmp-spec.rst there), by the library qemu.qmp."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    Runstate,
    StateError,
)
from qemu.qmp.qmp_client import BadReplyError

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_MAX_MESSAGE_BYTES = 4 << 20  # `info qtree` and `info mtree` of big machines have some hundred KiB
_MAX_WAITING_EVENTS = 64
_MAX_REFUSAL = 1000  # characters
_COMMAND_SECONDS = 10.0
_CLOSE_SECONDS = 2.0


class Events(EventListener):
    """The events of some names since one began to listen; of very many that nobody takes, the newest."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self._waiting: deque[Mapping[str, Any]] = deque(maxlen=_MAX_WAITING_EVENTS)
        self._came = asyncio.Event()

    async def put(self, event: Mapping[str, Any]) -> None:
        """Take an event that the library has received."""
        if event["event"] in self.names:
            self._waiting.append(event)
            self._came.set()

    async def take(self) -> Mapping[str, Any]:
        """Wait for the next event."""
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        return self._waiting.popleft()


class Monitor:
    """One connection to the monitor of one QEMU. Close it: QMP serves one client at a time.

    Every method may raise FerryError: VMM_UNREACHABLE (the connection is lost, or nothing came in time), VMM_FAILED
    (QEMU refused the command, or what answers does not speak QMP).
    """

    def __init__(self, path: str, client: QMPClient, connection: socket.socket) -> None:
        """Take a connected client. `connection` is its socket, held a second time, to send file descriptors."""
        self.path = path
        self._client = client
        self._connection = connection
        self._giving = asyncio.Lock()
        self._commands: frozenset[str] | None = None
        self._ending: asyncio.Task[Exception | None] | None = None

    @classmethod
    async def open(cls, path: str | Path, seconds: float) -> Self:
        """Connect within `seconds`."""
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            connection.setblocking(False)
            try:
                async with asyncio.timeout(seconds):
                    await _reach(connection, str(path))
                    client = await _greet(connection.dup(), str(path))
            except TimeoutError as error:
                raise FerryError(
                    Reason.VMM_UNREACHABLE,
                    f"the monitor at {path} has not greeted within {seconds:g} s: QMP serves one client at a time, and "
                    "another seems to hold it; give pageferry a monitor of its own (a second -qmp)",
                ) from error
            undo.pop_all()
            return cls(str(path), client, connection)

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended, from whatever side."""
        return self._client.runstate is not Runstate.RUNNING

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, seconds: float = _COMMAND_SECONDS
    ) -> Any:
        """Have a command executed, and return what QEMU returns."""
        try:
            async with asyncio.timeout(seconds):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise FerryError(
                Reason.VMM_UNREACHABLE, f"QEMU at {self.path} has not answered {command} within {seconds:g} s"
            ) from error
        except ExecuteError as error:
            why = f"{str(error)[:_MAX_REFUSAL]} ({error.error_class[:_MAX_REFUSAL]})"
            raise FerryError(Reason.VMM_FAILED, f"QEMU at {self.path} refuses {command}: {why}") from error
        except BadReplyError as error:
            raise FerryError(
                Reason.VMM_FAILED, f"QEMU at {self.path} answers {command} with something that is not QMP"
            ) from error
        except (ExecInterruptedError, StateError) as error:
            raise await self._lost(f"before it answered {command}") from error

    async def hmp(self, line: str, seconds: float = _COMMAND_SECONDS) -> str:
        """Return what a command of the human monitor prints. That one reports errors in its text, in no other way."""
        text = await self.execute("human-monitor-command", {"command-line": line}, seconds)
        if not isinstance(text, str):
            raise FerryError(Reason.VMM_FAILED, f"QEMU at {self.path} answers '{line}' with something that is no text")
        return text

    async def commands(self) -> frozenset[str]:
        """Return the names of all commands that this QEMU knows."""
        if self._commands is None:
            listed = await self.execute("query-commands")
            if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
                raise FerryError(Reason.VMM_FAILED, f"QEMU at {self.path} does not tell its commands")
            self._commands = frozenset(str(entry.get("name")) for entry in listed)
        return self._commands

    async def send_fd(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of a file descriptor, to be called `name` in commands that follow."""
        await self.execute_with_fd(fd, "getfd", {"fdname": name})

    async def execute_with_fd(self, fd: int, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Have a command executed that takes a file descriptor (getfd, add-fd); QEMU gets a duplicate of `fd`."""
        # QEMU keeps the last descriptor that came until a command takes it: two of these must not mix.
        async with self._giving:
            try:
                # The blank that carries it is white space between two messages.
                socket.send_fds(self._connection, [b" "], [fd])
            except BlockingIOError as error:
                raise FerryError(Reason.VMM_UNREACHABLE, f"QEMU at {self.path} does not read its monitor") from error
            except OSError as error:
                raise await self._lost(f"before it took the file descriptor for {command}") from error
            return await self.execute(command, arguments)

    @contextmanager
    def events(self, *names: str) -> Iterator[Events]:
        """Listen for events from now on: enter this before the command that causes them, then `wait_event`."""
        listener = Events(frozenset(names))
        with self._client.listen(listener):
            yield listener

    async def wait_event(self, events: Events, seconds: float) -> Mapping[str, Any]:
        """Return the next of the events that are listened for."""
        coming = asyncio.ensure_future(events.take())
        ended = asyncio.ensure_future(self._until_lost())
        try:
            await asyncio.wait({coming, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
            names = ", ".join(sorted(events.names))
            if ended.done():
                raise await self._lost(f"before an event came ({names})")
            raise FerryError(
                Reason.VMM_UNREACHABLE, f"QEMU at {self.path} has sent no event ({names}) within {seconds:g} s"
            )
        finally:
            for task in coming, ended:
                task.cancel()
            await asyncio.wait({coming, ended})

    async def close(self) -> None:
        """Hang up; QEMU goes on. Closing twice does nothing."""
        await self._end()

    async def _until_lost(self) -> None:
        while not self.is_closed:
            await self._client.runstate_changed()

    async def _lost(self, when: str) -> FerryError:
        """Return why the connection is over: it was closed, or what came over it was not QMP."""
        cause = await self._end()
        if cause is None or isinstance(cause, (EOFError, OSError)):
            return FerryError(Reason.VMM_UNREACHABLE, f"QEMU at {self.path} closed its monitor {when}; is it running?")
        return FerryError(
            Reason.VMM_FAILED,
            f"what answers at {self.path} does not speak QMP ({_short(cause)}), seen {when}",
        )

    async def _end(self) -> Exception | None:
        """End the connection, once for all who ask; return what had ended it before."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._disconnect())
        return await asyncio.shield(self._ending)

    async def _disconnect(self) -> Exception | None:
        # Where the peer reads nothing more, the library would wait for ever to have its last words sent.
        impatient = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._cut)
        try:
            await self._client.disconnect()
        # The library raises here, whatever it is, what had ended the connection.
        except Exception as error:
            return error
        else:
            return None
        finally:
            impatient.cancel()
            self._connection.close()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


async def _reach(connection: socket.socket, path: str) -> None:
    try:
        await asyncio.get_running_loop().sock_connect(connection, path)
    except OSError as error:
        raise FerryError(
            Reason.VMM_UNREACHABLE,
            f"no monitor answers at {path}: {error.strerror or error}; is QEMU running, with -qmp unix:PATH,server=on,"
            "wait=off?",
        ) from error


async def _greet(connection: socket.socket, path: str) -> QMPClient:
    """Return a client on a socket, which then is the client's."""
    client = QMPClient(readbuflen=_MAX_MESSAGE_BYTES)
    # All that it would log comes as an exception too.
    client.logger = logging.Logger("qmp", logging.CRITICAL + 1)  # noqa: LOG001 - one that nobody else knows
    # Its own listener keeps every event for ever.
    client.events.event_filter = lambda _: False
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            await client.connect(connection)
            undo.pop_all()
    except AssertionError as error:
        # The library's own: the connection has ended between its last word and its first look.
        with contextlib.suppress(Exception):
            await client.disconnect()
        raise FerryError(
            Reason.VMM_UNREACHABLE, f"the monitor at {path} hung up behind its greeting; is QEMU ending?"
        ) from error
    except ConnectError as error:
        if isinstance(error.exc, (EOFError, OSError)):
            raise FerryError(
                Reason.VMM_UNREACHABLE, f"the monitor at {path} hung up on its greeting; is QEMU ending?"
            ) from error
        raise FerryError(
            Reason.VMM_FAILED, f"what answers at {path} does not speak QMP ({_short(error.exc)}); is it QEMU's monitor?"
        ) from error
    return client


def _short(error: Exception) -> str:
    """Return the kind of an error: its text may hold all that came."""
    cause = getattr(error, "error", error)
    return type(cause).__name__
