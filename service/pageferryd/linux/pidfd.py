"""Handles on processes that cannot come to mean another process: pidfd_open(2), pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
from types import TracebackType
from typing import Self

from pageferry.errors import FerryError, Reason

_NR_PIDFD_GETFD = 438  # the same on every architecture (asm-generic/unistd.h)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint]
_syscall.restype = ctypes.c_long


class PidFd:
    """One process, held by a pidfd that this object owns."""

    def __init__(self, pid: int) -> None:
        """Open the process. FerryError(VMM_GONE) where no process has that id."""
        self.pid = pid
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except OSError as error:
            raise _failure(error, f"cannot open process {pid}") from error

    def fileno(self) -> int:
        """Return the pidfd; it becomes readable when the process exits."""
        return self._fd

    @property
    def exited(self) -> bool:
        """Whether the process has ended (a zombie has)."""
        return self.wait(0)

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the process to end; return whether it has."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def get_fd(self, number: int) -> int:
        """Return a duplicate of the process's file descriptor `number`, close-on-exec; the caller owns it.

        The duplicate shares its file position and status flags with the process. Needs the right to trace the process.
        """
        duplicate: int = _syscall(_NR_PIDFD_GETFD, self._fd, number, 0)
        if duplicate < 0:
            error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            raise _failure(error, f"cannot take file descriptor {number} of process {self.pid}")
        return duplicate

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal. FerryError(VMM_GONE) where the process has been reaped."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except OSError as error:
            raise _failure(error, f"cannot send {number.name} to process {self.pid}") from error

    def close(self) -> None:
        """Let the process go; it is not touched. Closing twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _failure(error: OSError, what: str) -> FerryError:
    """Return what an errno of the pidfd calls means."""
    if error.errno == errno.ESRCH:
        return FerryError(Reason.VMM_GONE, f"{what}: there is no such process")
    if error.errno in (errno.EPERM, errno.EACCES):
        return FerryError(
            Reason.PERMISSION_MISSING, f"{what}: not permitted; run with CAP_SYS_PTRACE, or as the same user"
        )
    if error.errno in (errno.EBADF, errno.EINVAL):
        return FerryError(Reason.INVALID_ARGUMENT, f"{what}: {error.strerror}")
    return FerryError(Reason.VMM_FAILED, f"{what}: {error.strerror}")
