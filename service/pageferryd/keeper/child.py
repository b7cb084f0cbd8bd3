"""Starts a process with the descriptors that are held for it: sd_listen_fds(3), from the manager's side."""

from __future__ import annotations

import fcntl
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from pageferryd.linux.notify_wire import FIRST_FD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pageferryd.keeper.handlers import Handlers
    from pageferryd.keeper.held import Entry

_OURS = ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
_CANNOT_START = 127


def environment(
    inherited: Mapping[str, str], address: str, capacity: int, names: Sequence[str], pid: int
) -> dict[str, str]:
    """Return the variables of process `pid`: those inherited, and what systemd would set."""
    variables = {name: value for name, value in inherited.items() if name not in _OURS}
    variables |= {"NOTIFY_SOCKET": address, "FDSTORE": str(capacity)}
    if names:
        variables |= {"LISTEN_PID": str(pid), "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
    return variables


def start(
    command: Sequence[str], variables: Callable[[int], dict[str, str]], held: Sequence[Entry], signals: Handlers
) -> int:
    """Start `command` with what is held, as descriptors from 3 on; return its process id. Raises OSError.

    `variables` gives the environment for a process id: $LISTEN_PID is known only between fork and exec. A command that
    cannot be executed ends with code 127, having said why on stderr. The caller must have one thread only.
    """
    # A signal between fork and exec would reach the keeper's handlers, in the wrong process.
    with signals.blocked():
        pid = os.fork()
        if not pid:
            _execute(command, variables, held, signals)
        return pid


def _execute(
    command: Sequence[str], variables: Callable[[int], dict[str, str]], held: Sequence[Entry], signals: Handlers
) -> NoReturn:
    try:
        # First out of the way, for their places may be each other's.
        aside = [fcntl.fcntl(entry.fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD + len(held)) for entry in held]
        for place, fd in enumerate(aside, FIRST_FD):
            os.dup2(fd, place)
        signals.forget()
        os.execve(command[0], list(command), variables(os.getpid()))  # noqa: S606 - a shell is not wanted
    except Exception as error:
        print(f"pageferryd: the keeper cannot execute {command[0]}: {error}", file=sys.stderr, flush=True)
    finally:
        # Whatever happened: two keepers must not go on.
        os._exit(_CANNOT_START)
