"""Runs the keeper: what it needs is made, and taken down again."""

from __future__ import annotations

import os
import resource
import select
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from pageferryd.keeper.backoff import Backoff
from pageferryd.keeper.handlers import Handlers
from pageferryd.keeper.held import Held
from pageferryd.keeper.keeper import BAD_CONFIGURATION, Keeper
from pageferryd.keeper.lines import Lines
from pageferryd.keeper.notify_socket import NotifySocket, clear_away

if TYPE_CHECKING:
    from collections.abc import Sequence

CAPACITY: Final = 4096
"""How many descriptors are held at most: as many as deploy/systemd/pageferryd.service has systemd hold."""

STOP_SECONDS: Final = 45.0
_OPEN_FILES: Final = 65536  # LimitNOFILE of the unit
_OTHER_FILES: Final = 64
# Not from the working directory, which may be anybody's.
_PYTHON: Final = (sys.executable, "-P", "-m")


def become(
    arguments: Sequence[str], runtime_dir: Path, *, stop_seconds: float = STOP_SECONDS, log_format: str = "json"
) -> NoReturn:
    """Make this process the keeper, which is `run`, without anything that it imported. Raises OSError."""
    own = (str(runtime_dir), str(stop_seconds), log_format)
    os.execv(sys.executable, [*_PYTHON, "pageferryd.keeper", *own, *arguments])  # noqa: S606 - a shell is not wanted


def run(
    arguments: Sequence[str],
    runtime_dir: Path,
    *,
    stop_seconds: float = STOP_SECONDS,
    log_format: str = "json",
    capacity: int = CAPACITY,
    command: Sequence[str] = (*_PYTHON, "pageferryd.sidecar"),
    backoff: Backoff | None = None,
) -> int:
    """Start the sidecar with these options, start it again whenever it ends, and return an exit code.

    This process must have one thread and do nothing else: its signals, its children and its umask are the keeper's.
    `stop_seconds`: how long the sidecar may drain before it is killed. `log_format`: json or console. `capacity`: how
    many descriptors are held at most; fewer where the limit of open files is low.
    """
    lines = Lines(log_format)
    with ExitStack() as undo:
        try:
            runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if other := clear_away(runtime_dir):
                return _refuse("ADDRESS_IN_USE", f"another keeper runs already, and listens at {other}")
            notify = NotifySocket(runtime_dir)
        except OSError as error:
            return _refuse("PERMISSION_MISSING", f"the keeper cannot listen in {runtime_dir}: {error}; set runtime_dir")
        undo.callback(notify.close)
        signals = Handlers()
        undo.callback(signals.close)
        events = select.epoll()
        undo.callback(events.close)
        held = Held(min(capacity, _room()), events)
        undo.callback(held.close)
        if "FDSTORE" in os.environ:
            lines.say("warning", "manager_stores_already", remedy="start pageferryd without --keeper")
        lines.say("info", "keeper_ready", socket=str(notify.path), capacity=held.capacity)
        return Keeper(
            (*command, *arguments), notify, held, events, signals, lines, backoff or Backoff(), stop_seconds
        ).run()


def _refuse(reason: str, sentence: str) -> int:
    print(f"pageferryd: {reason}: {sentence}", file=sys.stderr)
    return BAD_CONFIGURATION


def _room() -> int:
    """Allow as many open files as the unit does; return how many descriptors can be held: a start needs each twice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        soft = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CAPACITY if soft == resource.RLIM_INFINITY else max(0, (soft - _OTHER_FILES) // 2)
