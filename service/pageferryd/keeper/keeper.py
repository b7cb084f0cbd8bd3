"""The keeper's loop: the sidecar's datagrams, the signals, and the sidecar's ends."""

from __future__ import annotations

import os
import select
import signal
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

from pageferryd.keeper import child
from pageferryd.linux import notify_wire
from pageferryd.linux.notify_wire import Action

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferryd.keeper.backoff import Backoff
    from pageferryd.keeper.handlers import Handlers
    from pageferryd.keeper.held import Held
    from pageferryd.keeper.lines import Lines
    from pageferryd.keeper.notify_socket import Datagram, NotifySocket

BAD_CONFIGURATION: Final = 2
# No more at once, so that signals are heard under a flood of datagrams.
_DATAGRAMS_AT_ONCE: Final = 64
# More than any queue of a Unix socket has (net.unix.max_dgram_qlen): all that a process left behind is among them.
_DATAGRAMS_LEFT: Final = 1 << 16


class _Aim(Enum):
    """What is to become of the sidecar: go on, end and be started anew, or end for good."""

    SERVE = "serve"
    RENEW = "renew"
    END = "end"


class Keeper:
    """Starts a command, holds what it stores, and starts it again until it has ended for good."""

    def __init__(
        self,
        command: Sequence[str],
        notify: NotifySocket,
        held: Held,
        events: select.epoll,
        signals: Handlers,
        lines: Lines,
        backoff: Backoff,
        stop_seconds: float,
    ) -> None:
        """Nothing given is closed by this object. `command` begins with a path; it has `stop_seconds` to end."""
        self._command = command
        self._notify = notify
        self._held = held
        self._events = events
        self._signals = signals
        self._lines = lines
        self._backoff = backoff
        self._stop_seconds = stop_seconds
        self._aim = _Aim.SERVE
        self._pid = 0
        self._started_at = 0.0
        self._start_at = time.monotonic()
        self._kill_at = 0.0
        self._code = 0
        self._ended = False
        events.register(notify.fileno(), select.EPOLLIN)
        events.register(signals.fileno(), select.EPOLLIN)

    def run(self) -> int:
        """Return the exit code for the keeper once it is to end; the sidecar has ended by then."""
        while not self._ended:
            self._attend_to_time()
            for fd, _ in self._events.poll(self._wait_seconds()):
                if fd == self._notify.fileno():
                    self._hear(_DATAGRAMS_AT_ONCE)
                elif fd == self._signals.fileno():
                    self._answer_signals()
                elif name := self._held.hung_up(fd):
                    self._lines.say("info", "descriptor_hung_up", name=name)
        if len(self._held):
            self._lines.say("warning", "descriptors_let_go", descriptors=len(self._held))
        return self._code

    def _wait_seconds(self) -> float | None:
        due = self._kill_at if self._pid else self._start_at
        return max(0.0, due - time.monotonic()) if due else None

    def _attend_to_time(self) -> None:
        now = time.monotonic()
        if not self._pid:
            if now >= self._start_at:
                self._start()
        elif self._kill_at and now >= self._kill_at:
            self._kill_at = 0.0
            self._lines.say("error", "sidecar_killed", pid=self._pid, seconds=self._stop_seconds)
            os.kill(self._pid, signal.SIGKILL)

    def _start(self) -> None:
        held = list(self._held)
        names = [entry.name for entry in held]

        def variables(pid: int) -> dict[str, str]:
            return child.environment(os.environ, str(self._notify.path), self._held.capacity, names, pid)

        self._started_at = time.monotonic()
        try:
            self._pid = child.start(self._command, variables, held, self._signals)
        except OSError as error:
            self._lines.say("error", "sidecar_not_started", error=error.strerror or str(error))
            self._start_again(self._backoff.after(0.0))
            return
        self._lines.say("info", "sidecar_started", pid=self._pid, descriptors=len(held))

    def _start_again(self, seconds: float) -> None:
        self._start_at = time.monotonic() + seconds
        self._lines.say("warning", "sidecar_starts_again", seconds=seconds, descriptors=len(self._held))

    # --- signals

    def _answer_signals(self) -> None:
        arrived = self._signals.arrived()
        if arrived & {signal.SIGTERM, signal.SIGINT}:
            self._aim = _Aim.END
            if self._pid:
                self._ask_to_end()
            else:
                self._ended = True
        elif signal.SIGHUP in arrived:
            self._renew()
        if signal.SIGCHLD in arrived:
            self._reap()

    def _renew(self) -> None:
        if self._aim is _Aim.SERVE and self._pid:
            self._lines.say("info", "sidecar_renewed", pid=self._pid, descriptors=len(self._held))
            self._aim = _Aim.RENEW
            self._ask_to_end()
        elif not self._pid:
            self._start_at = time.monotonic()

    def _ask_to_end(self) -> None:
        # Once only is the time set: asking again gives no more of it.
        self._kill_at = self._kill_at or time.monotonic() + self._stop_seconds
        os.kill(self._pid, signal.SIGTERM)

    def _reap(self) -> None:
        """See to all processes that ended: as the first process of a container, the keeper gets others' too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self._pid:
                # What it sent before it ended counts, and is from its process id.
                self._hear(_DATAGRAMS_LEFT)
                self._pid = 0
                self._kill_at = 0.0
                self._sidecar_ended(os.waitstatus_to_exitcode(status))

    def _sidecar_ended(self, code: int) -> None:
        self._code = code if code >= 0 else 128 - code
        lived = time.monotonic() - self._started_at
        level = "error" if code and self._aim is _Aim.SERVE else "info"
        self._lines.say(level, "sidecar_ended", code=self._code, lived=round(lived, 3), descriptors=len(self._held))
        aim, self._aim = self._aim, _Aim.SERVE
        if aim is _Aim.END:
            self._ended = True
        elif aim is _Aim.RENEW:
            self._start_at = time.monotonic()
        elif code not in (0, BAD_CONFIGURATION):
            self._start_again(self._backoff.after(lived))
        elif not len(self._held):
            self._ended = True
        else:
            # Guests wait for pages that only a sidecar with these descriptors can install: never give up on them.
            self._start_again(self._backoff.most if code else self._backoff.after(lived))

    # --- datagrams

    def _hear(self, most: int) -> None:
        for _ in range(most):
            try:
                datagram = self._notify.receive()
            except OSError as error:
                self._lines.say_seldom("datagram_not_received", error=error.strerror or str(error))
                return
            if datagram is None:
                return
            self._obey(datagram)

    def _obey(self, datagram: Datagram) -> None:
        fds = datagram.fds
        try:
            if not datagram.pid or datagram.pid != self._pid:
                self._lines.say_seldom("stranger_ignored", pid=datagram.pid, sidecar=self._pid)
                return
            notice = notify_wire.parse(datagram.data) if datagram.whole else None
            if notice is None:
                self._lines.say_seldom("datagram_ignored", length=len(datagram.data), whole=int(datagram.whole))
                return
            if notice.action is Action.STORE:
                self._store(notice.name, fds, poll=notice.poll)
                fds = []
            elif notice.action is Action.REMOVE:
                self._held.remove(notice.name)
            if notice.ready:
                self._lines.say("info", "sidecar_ready", pid=self._pid)
            if notice.stopping:
                self._lines.say("info", "sidecar_stopping", pid=self._pid)
        finally:
            # With a barrier, this is the answer.
            for fd in fds:
                os.close(fd)

    def _store(self, name: str, fds: list[int], *, poll: bool) -> None:
        if refused := self._held.store(name, fds, poll=poll):
            self._lines.say_seldom("store_full", name=name, refused=refused, capacity=self._held.capacity)
