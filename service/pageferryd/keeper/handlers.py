"""The signals that the keeper answers to, as bytes in a pipe that can be polled: signal(7), signal.set_wakeup_fd."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Handlers:
    """SIGTERM, SIGINT, SIGHUP and SIGCHLD of this process; one object a process, in its main thread."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # A handler that does nothing: without one the kernel would do what it does by default.
        self._before = {number: signal.signal(number, lambda *_: None) for number in _NUMBERS}

    def fileno(self) -> int:
        """Return the descriptor that is readable when a signal came."""
        return self._reader

    def arrived(self) -> set[int]:
        """Return the numbers of the signals that came since."""
        try:
            return set(os.read(self._reader, 4096))
        except BlockingIOError:
            return set()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Keep these signals from this thread for a while; they come after it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def forget(self) -> None:
        """In a new process, before it executes another program: no signal is for the keeper any more."""
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            # nohup(1), and shells for what runs in the background, ignore signals for those that they start.
            signal.signal(number, signal.SIG_IGN if before is signal.SIG_IGN else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)

    def close(self) -> None:
        """Give the signals back."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)
