"""One vCPU: a thread that runs it until it is stopped, and its registers while it stands still."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pageferry.guests.kvm.absent import AbsentPages

Report = Callable[[abi.Regs], None]
"""Called in the vCPU's thread with the registers at a report of the program."""

_KICK: Final = signal.SIGUSR1
"""Blocked in the vCPU's thread except inside KVM_RUN: it ends a run, early or late, and never reaches a handler."""

_EXIT_NAMES: Final = {
    abi.KVM_EXIT_MMIO: "an access to an address without memory",
    abi.KVM_EXIT_SHUTDOWN: "a triple fault",
    abi.KVM_EXIT_FAIL_ENTRY: "a refused entry",
    abi.KVM_EXIT_INTERNAL_ERROR: "an internal error of KVM",
}

# Not fcntl.ioctl: ctypes never repeats a call that a signal ended, and lets go of the GIL in any version of Python.
_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


class Vcpu:
    """The vCPU behind a descriptor and its mapped struct kvm_run. It stands still at first."""

    def __init__(self, fd: int, mapping: mmap.mmap, report_page: int, on_report: Report) -> None:
        self._fd = fd
        self._run = abi.Run.from_buffer(mapping)
        self._report_page = report_page
        self._on_report = on_report
        self.absent: AbsentPages | None = None
        """What completes accesses to pages that have not come. Set only while the vCPU stands still."""
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._stopping = False
        self._stopped: Future[None] = Future()
        self._stopped.set_result(None)
        only_the_kick = (1 << 64) - 1 & ~(1 << _KICK - 1)
        fcntl.ioctl(fd, abi.KVM_SET_SIGNAL_MASK, abi.SignalMask(len=8, sigset=only_the_kick))

    def start(self) -> Future[None]:
        """Let the vCPU run in a thread; the future is done when it stands still again, or has failed."""
        if not self._stopped.done():
            raise FerryError(Reason.ILLEGAL_STATE, "the vCPU is running already")
        self._stopping = False
        self._stopped = Future()
        # From here on whoever waits can only give up waiting, not cancel it.
        self._stopped.set_running_or_notify_cancel()
        # A daemon: a vCPU whose page never comes must not keep the process from ending.
        threading.Thread(target=self._live, args=(self._stopped,), name="vcpu", daemon=True).start()
        return self._stopped

    def stop(self) -> Future[None]:
        """Ask the vCPU to stand still, at a boundary between two instructions; the future of `start` tells when."""
        with self._lock:
            self._stopping = True
            if self._thread is not None:
                signal.pthread_kill(self._thread, _KICK)
        return self._stopped

    def regs(self) -> abi.Regs:
        """Return the general registers. Waits for the vCPU to stand still."""
        regs = abi.Regs()
        fcntl.ioctl(self._fd, abi.KVM_GET_REGS, regs)
        return regs

    def sregs(self) -> abi.Sregs:
        """Return the segment and control registers. Waits for the vCPU to stand still."""
        sregs = abi.Sregs()
        fcntl.ioctl(self._fd, abi.KVM_GET_SREGS, sregs)
        return sregs

    def load(self, regs: abi.Regs, sregs: abi.Sregs) -> None:
        """Set all registers of the vCPU, which stands still."""
        try:
            fcntl.ioctl(self._fd, abi.KVM_SET_SREGS, sregs)
            fcntl.ioctl(self._fd, abi.KVM_SET_REGS, regs)
        except OSError as error:
            raise FerryError(Reason.VMM_FAILED, f"KVM refused the vCPU's registers: {error}") from error

    def close(self) -> None:
        """Close the descriptor of the vCPU, which stands still. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _live(self, stopped: Future[None]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with self._lock:
            self._thread = threading.get_ident()
            if self._stopping:
                signal.pthread_kill(self._thread, _KICK)
        failure: BaseException | None = None
        try:
            self._run_until_stopped()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the vCPU
            failure = error
        with self._lock:
            self._thread = None
        if failure is None:
            stopped.set_result(None)
        else:
            stopped.set_exception(failure)

    def _run_until_stopped(self) -> None:
        # Only an interrupted run may be the last: KVM completes a report when it is entered again.
        while not (self._enter_guest() and self._stopping):
            pass

    def _enter_guest(self) -> bool:
        """Run the guest until it comes out; tell whether a signal brought it out."""
        if _ioctl(self._fd, abi.KVM_RUN, 0) == 0:
            self._handle_exit()
            return False
        number = ctypes.get_errno()
        if number == errno.EINTR:
            return True
        if self.absent is not None and self._run.exit_reason == abi.KVM_EXIT_MEMORY_FAULT:
            self.absent.resolve_exit(self._run.memory_fault)
            return False
        raise FerryError(Reason.VMM_FAILED, f"the vCPU cannot run: {os.strerror(number)}, at {self.regs().rip:#x}")

    def _handle_exit(self) -> None:
        reason = self._run.exit_reason
        if reason == abi.KVM_EXIT_MMIO and self.absent is not None and self.absent.complete(self._run.mmio):
            return
        regs = self.regs()
        if reason == abi.KVM_EXIT_MMIO and self._run.mmio.is_write and self._run.mmio.phys_addr == self._report_page:
            self._on_report(regs)
            return
        what = _EXIT_NAMES.get(reason, f"an unexpected exit {reason}")
        detail = {
            abi.KVM_EXIT_MMIO: f" ({self._run.mmio.phys_addr:#x})",
            abi.KVM_EXIT_FAIL_ENTRY: f" ({self._run.fail_entry.hardware_entry_failure_reason:#x})",
            abi.KVM_EXIT_INTERNAL_ERROR: f" ({self._run.suberror})",
        }.get(reason, "")
        raise FerryError(Reason.VMM_FAILED, f"the vCPU stopped at {regs.rip:#x} by {what}{detail}")
