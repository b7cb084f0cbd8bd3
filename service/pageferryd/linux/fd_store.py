"""Descriptors that outlive this process: its manager's file descriptor store, sd_pid_notify_with_fds(3).

The manager is systemd (FileDescriptorStoreMax= in systemd.service(5)) or pageferryd's own keeper. What a process stores
there, the next one finds: after a crash, a kill, an upgrade.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from pageferry.errors import FerryError, Reason
from pageferryd.linux import notify_wire

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

ANSWER_SECONDS: Final = 5.0
"""How long the manager may take over one descriptor: systemd reloading all its units takes a second or two."""

_MAX_GIVEN: Final = 1 << 16
_VARIABLES: Final = (
    "NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES",
)  # fmt: skip


class FdStore:
    """What the manager holds for this process. Its methods may be called from any thread.

    Where no manager stores, `available` is False, and everything else does nothing.
    """

    def __init__(self, address: str, limit: int, given: Sequence[tuple[str, int]] = ()) -> None:
        """Speak to the manager at `address` ("" for none), which holds up to `limit` descriptors.

        `given`: the name and descriptor of each that an earlier process stored; this object owns them.
        """
        self._address = address
        self._limit = limit
        self._lock = threading.Lock()
        self._held = Counter(name for name, _ in given)
        self._untaken: dict[str, list[int]] = {}
        for name, fd in given:
            self._untaken.setdefault(name, []).append(fd)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> FdStore:
        """Take over what the manager gave to this process, and remove its variables from `environ`.

        Call it before any other process is started: until then the descriptors are not close-on-exec. Without $FDSTORE
        no manager is believed to store: systemd sets it since 254. FerryError(CONFIG_INVALID) where the variables
        contradict themselves.
        """
        found = {name: environ.pop(name, "") for name in _VARIABLES}
        address = found["NOTIFY_SOCKET"]
        if address and address[0] not in "/@":
            raise FerryError(
                Reason.CONFIG_INVALID,
                f"NOTIFY_SOCKET is {address!r}, which is no Unix socket; run pageferryd as a service of systemd itself",
            )
        return cls(address, _number("FDSTORE", found["FDSTORE"]), _given(found))

    @property
    def available(self) -> bool:
        """Whether there is a manager that stores."""
        return bool(self._address) and self._limit > 0

    def keep(self, name: str, fd: int) -> None:
        """Have the manager hold a descriptor too; it does when this returns. The caller keeps its own.

        Blocks, mostly far below a millisecond, at most for ANSWER_SECONDS. One open file is held once, under the name
        that it was first stored with. FerryError: INVALID_ARGUMENT for a name or descriptor that cannot be stored,
        NO_SPACE where the store is full, INTERNAL where the manager is gone or does not answer.
        """
        if not notify_wire.is_name(name):
            raise FerryError(
                Reason.INVALID_ARGUMENT,
                f"a descriptor cannot be stored as {name[:300]!r}: names are 1 to {notify_wire.MAX_NAME_BYTES} "
                "printable ASCII characters without a colon",
            )
        if not self.available:
            return
        with self._lock:
            self._check_space(name)
            deadline = time.monotonic() + ANSWER_SECONDS
            if not self._send(notify_wire.store(name), [fd], deadline):
                raise self._gone(name)
            # From here on the manager may have it, whatever it answers.
            self._held[name] += 1
            self._barrier(name, deadline)

    def drop(self, name: str) -> None:
        """Have the manager let go of all descriptors of a name; those not taken are closed. Unknown names do nothing.

        A manager that is gone holds nothing, which is no error here. FerryError(INTERNAL) where it does not listen.
        """
        with self._lock:
            for fd in self._untaken.pop(name, ()):
                os.close(fd)
            if self._held.pop(name, 0) and self._address:
                self._send(notify_wire.remove(name), [], time.monotonic() + ANSWER_SECONDS)

    def take(self, name: str) -> list[int]:
        """Return what an earlier process stored under a name; the caller owns it. A second call returns nothing.

        The manager holds it further, until `drop`: do not store it again. Several of one name come in the manager's
        order: the keeper's is the oldest first, systemd's the newest.
        """
        with self._lock:
            return self._untaken.pop(name, [])

    def names(self) -> list[str]:
        """Return the names that an earlier process stored and nobody has taken yet."""
        with self._lock:
            return list(self._untaken)

    def close_untaken(self) -> None:
        """Let go of what nobody took, here and in the manager. FerryError as for `drop`.

        Under a name that something was stored with since, the manager goes on to hold both.
        """
        for name in self.names():
            with self._lock:
                stored_since = self._held[name] > len(self._untaken.get(name, ()))
            if stored_since:
                # The manager knows names only: it holds the older one on, rather than let go of the newer one too.
                for fd in self.take(name):
                    os.close(fd)
            else:
                self.drop(name)

    def ready(self) -> None:
        """Tell the manager that this service serves. FerryError(INTERNAL) where it does not listen."""
        self._tell(notify_wire.READY)

    def stopping(self) -> None:
        """Tell the manager that this service is about to end. FerryError(INTERNAL) where it does not listen."""
        self._tell(notify_wire.STOPPING)

    def _tell(self, message: bytes) -> None:
        # A manager that is gone need not be told.
        if self._address:
            self._send(message, [], time.monotonic() + ANSWER_SECONDS)

    def _check_space(self, name: str) -> None:
        count = self._held.total() + 1
        characters = len(name) + sum(len(held) * times for held, times in self._held.items())
        if count > self._limit:
            raise FerryError(
                Reason.NO_SPACE,
                f"descriptor {name} cannot be stored: all {self._limit} places are taken; raise "
                "FileDescriptorStoreMax, or move fewer guests at once",
            )
        if notify_wire.names_bytes(count, characters) > notify_wire.MAX_NAMES_BYTES:
            raise FerryError(
                Reason.NO_SPACE,
                f"descriptor {name} cannot be stored: the names of the {count} would be longer than a new process can "
                "be told; move fewer guests at once",
            )

    def _barrier(self, name: str, deadline: float) -> None:
        """Wait until the manager has gone through all that was sent before: it closes the pipe then."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                if not self._send(notify_wire.BARRIER, [writer], deadline):
                    raise self._gone(name)
            finally:
                os.close(writer)
            poll = select.poll()
            poll.register(reader, 0)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise self._silent()
        finally:
            os.close(reader)

    def _send(self, message: bytes, fds: list[int], deadline: float) -> bool:
        """Send one datagram; return whether anybody is there to have it."""
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # Not 0, which would not wait for a short queue to empty but fail in another way.
            sender.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                sender.connect(address)
                sender.sendmsg([message], rights)
            except TimeoutError as error:
                raise self._silent() from error
            except (ConnectionError, FileNotFoundError):
                return False
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise FerryError(Reason.INVALID_ARGUMENT, f"descriptor {fds} is not open: not stored") from error
                raise FerryError(
                    Reason.INTERNAL, f"the service manager at {self._address} cannot be told: {error.strerror or error}"
                ) from error
        return True

    def _gone(self, name: str) -> FerryError:
        return FerryError(
            Reason.INTERNAL,
            f"descriptor {name} is not stored: nobody listens at {self._address} any more, the service manager or "
            "keeper is gone; nothing of this sidecar outlives it until it is started under a new one",
        )

    def _silent(self) -> FerryError:
        return FerryError(
            Reason.INTERNAL,
            f"the service manager at {self._address} has not answered within {ANSWER_SECONDS:g} s; is it stopped?",
        )


def _given(found: dict[str, str]) -> list[tuple[str, int]]:
    """Return name and descriptor of each that was given to this very process, close-on-exec from now on."""
    if _number("LISTEN_PID", found["LISTEN_PID"]) != os.getpid():
        return []
    count = _number("LISTEN_FDS", found["LISTEN_FDS"])
    if count > _MAX_GIVEN:
        raise FerryError(Reason.CONFIG_INVALID, f"LISTEN_FDS is {count}, more than {_MAX_GIVEN}")
    names = found["LISTEN_FDNAMES"].split(":") if found["LISTEN_FDNAMES"] else ["unknown"] * count
    if len(names) != count:
        raise FerryError(Reason.CONFIG_INVALID, f"LISTEN_FDS is {count}, but LISTEN_FDNAMES names {len(names)}")
    given = [(name, notify_wire.FIRST_FD + index) for index, name in enumerate(names)]
    for name, fd in given:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise FerryError(
                Reason.CONFIG_INVALID, f"LISTEN_FDS is {count}, but descriptor {fd} ({name}) is not open"
            ) from error
    return given


def _number(variable: str, value: str) -> int:
    if not value:
        return 0
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise FerryError(Reason.CONFIG_INVALID, f"the environment variable {variable} is no number: {value[:64]!r}")
    return int(value)
