"""System calls made by the main thread of another, unmodified process: ptrace(2), on x86-64 Linux.

The thread is stopped on its way to user mode (PTRACE_EVENT_STOP), has its registers pointed at a `syscall` instruction
of its own, is let run from one syscall-stop to the next, and stands at the end where it stood at first, so that the
kernel itself goes on with what it interrupted: it restarts the system call, or delivers the signal that came meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from pageferry.errors import FerryError, Reason
from pageferryd.linux.traceable import INSTRUCTION, find_instruction, refusal, status_fields

# By the first letter of State in /proc/PID/status, proc_pid_status(5).
_WHY_LATE = {
    "D": "it waits in the kernel for something that signals do not interrupt",
    "R": "it gets no processor, or is busy in the kernel",
    "t": "it has stopped, which something else in this program that waits for its children has been told instead",
}
_T = TypeVar("_T")

# linux/ptrace.h
_GETREGS, _SETREGS, _DETACH, _SYSCALL, _CONT = 12, 13, 17, 24, 7
_SETOPTIONS, _GETSIGINFO, _SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK = 0x4200, 0x4202, 0x4206, 0x4207, 0x420A, 0x420B
_EVENT_STOP = 128
_OPTION_SYSGOOD, _OPTION_EXITKILL = 1, 1 << 20
_SYSCALL_STOP = signal.SIGTRAP | 0x80
# linux/wait.h, asm-generic/siginfo.h: siginfo as 32 ints.
_P_PID, _WNOHANG, _WSTOPPED, _WALL = 1, 1, 2, 0x40000000
_SI_CODE, _SI_STATUS = 2, 6

_STOP_SECONDS = 2.0
_CALL_SECONDS = 10.0
_SPIN_SECONDS = 0.0002
_POLL_SECONDS = 0.0001

_CS_64 = 0x33
_RED_ZONE = 128
_SCRATCH_BYTES = 2048
_WORD = (1 << 64) - 1
_MAX_ERRNO, _ERESTARTSYS = 4095, 512
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
# Raised by the kernel for what a thread does, these reset their handler when they come blocked.
_FORCED = (signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS)
_BLOCKED = _WORD & ~sum(1 << number - 1 for number in _FORCED)

# PyDLL keeps the interpreter's lock: let go of, it could come back milliseconds later, while the thread stands.
_libc = ctypes.PyDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long
_waitid = _libc.waitid
_waitid.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_pread, _pwrite = _libc.pread, _libc.pwrite
for _copy in (_pread, _pwrite):
    _copy.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    _copy.restype = ctypes.c_ssize_t


class _LateError(Exception):
    """The thread did not stop in time."""


class _Registers(ctypes.Structure):
    """struct user_regs_struct of sys/user.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS]


def traced(pid: int, work: Callable[[Tracee], _T]) -> _T:
    """Stop the main thread of a process, do `work` with it, let it go; return what `work` returned.

    This is done by an OS thread of its own, whose end makes the kernel let go of a thread that could not be stopped.
    FerryError as in Tracee.
    """

    def attended() -> _T:
        with Tracee(pid) as tracee:
            return work(tracee)

    with ThreadPoolExecutor(1, "ptrace") as own:
        return own.submit(attended).result()


class Tracee:
    """The main thread of a process, stopped, and made to run system calls; a context manager for ONE OS thread.

    Prefer `traced`. While it is used nobody else in this program may wait(2) for the process. Should this program end
    while the thread has registers that are not its own, the kernel kills the process: it must not run on with them.

    FerryError: VMM_GONE; PERMISSION_MISSING; VMM_FAILED (another tracer has it, not x86-64, does not stop).
    """

    def __init__(self, pid: int) -> None:
        """Touch nothing yet."""
        self.pid = pid
        self.stopped_seconds = 0.0
        """How long the thread stood, from the request to stop to its release; known after the exit."""
        self._memory = -1
        self._attached = self._stands = self._changed = False
        self._asked_at = 0.0
        self._instruction = 0
        self._saved, self._used = _Registers(), _Registers()
        self._mask, self._blocked = ctypes.c_uint64(), ctypes.c_uint64(_BLOCKED)
        self._info = (ctypes.c_int * 32)()
        self._overwritten: list[tuple[int, bytes]] = []
        self._scratch = 0
        self._held: list[int] = []
        self._raised = 0

    def __enter__(self) -> Self:
        """Stop the thread."""
        if platform.machine() != "x86_64":
            raise FerryError(
                Reason.VMM_FAILED,
                f"cannot make process {self.pid} run system calls: this machine is {platform.machine()}, and only "
                "x86_64 is supported",
            )
        try:
            self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            self._instruction = find_instruction(self.pid, self._memory)
            _checked(_ptrace(_SEIZE, self.pid, None, _OPTION_SYSGOOD))
            self._attached = True
            self._stop()
        except OSError as error:
            self._leave()
            raise refusal(self.pid, error) from error
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Restore the thread, and let it go on."""
        self._leave()

    def call(self, number: int, *arguments: int, meanwhile: Callable[[], None] | None = None) -> int:
        """Have the thread make a system call; return its result. OSError where it failed.

        `meanwhile`, which may raise FerryError, is called again and again while the call has not returned.
        FerryError(VMM_FAILED) after 10 s; then the process is lost, unless the call still returns soon.
        """
        if not self._stands:
            raise FerryError(Reason.VMM_FAILED, f"process {self.pid} does not stand, it can make no system call")
        self._prepare()
        self._raised = 0
        registers = self._used
        ctypes.memmove(ctypes.byref(registers), ctypes.byref(self._saved), ctypes.sizeof(registers))
        for name, value in zip(_ARGUMENTS, (*arguments, 0, 0, 0, 0, 0, 0), strict=False):
            setattr(registers, name, value & _WORD)
        # With orig_rax the kernel would take the thread as interrupted in a call, and move rip to restart it.
        registers.rip, registers.rax, registers.orig_rax = self._instruction, number, _WORD
        self._request(_SETREGS, ctypes.byref(registers))
        try:
            self._run_to_syscall_stop(None)
            self._run_to_syscall_stop(meanwhile)
        except _LateError as error:
            raise FerryError(
                Reason.VMM_FAILED, f"system call {number} in process {self.pid} took over {_CALL_SECONDS:g} s"
            ) from error
        self._request(_GETREGS, ctypes.byref(registers))
        result = int(registers.rax)
        if result > _WORD - _MAX_ERRNO:
            number = _WORD + 1 - result
            # From 512 on they are the kernel's own, for calls that are to be restarted.
            number = number if number < _ERESTARTSYS else errno.EINTR
            raise OSError(number, os.strerror(number))
        return result

    def put_bytes(self, data: bytes) -> int:
        """Write up to 2 KiB in all below the thread's stack; return the address. Undone when the thread goes on."""
        self._scratch += len(data) + 15 & ~15
        if self._scratch > _SCRATCH_BYTES:
            raise ValueError(f"{self._scratch} bytes do not fit the {_SCRATCH_BYTES} of scratch space")
        address = (int(self._saved.rsp) - _RED_ZONE & ~15) - self._scratch
        self._overwritten.append((address, self.get_bytes(address, len(data))))
        self._write(address, data)
        return address

    def get_bytes(self, address: int, length: int) -> bytes:
        """Return bytes of the process's memory. FerryError(VMM_FAILED) where they cannot be read."""
        buffer = ctypes.create_string_buffer(length)
        if _pread(self._memory, buffer, length, address) != length:
            raise FerryError(Reason.VMM_FAILED, f"cannot read {length} bytes at {address:#x} of process {self.pid}")
        return bytes(buffer)

    def _write(self, address: int, data: bytes) -> None:
        if _pwrite(self._memory, data, len(data), address) != len(data):
            raise FerryError(Reason.VMM_FAILED, f"cannot write {len(data)} bytes at {address:#x} of process {self.pid}")

    def _stop(self) -> None:
        self._asked_at = time.monotonic()
        self._request(_INTERRUPT)
        try:
            self._await_event_stop()
        except _LateError as error:
            raise FerryError(
                Reason.VMM_FAILED,
                f"the main thread of process {self.pid} did not stop within {_STOP_SECONDS:g} s: {_seen(self.pid)}",
            ) from error
        self._request(_GETREGS, ctypes.byref(self._saved))
        if self._saved.cs != _CS_64:
            raise FerryError(
                Reason.VMM_FAILED, f"process {self.pid} runs 32-bit code, and only x86-64 processes are supported"
            )
        self._request(_GETSIGMASK, ctypes.byref(self._mask), 8)
        self._choose_instruction()

    def _choose_instruction(self) -> None:
        if self._saved.orig_rax != _WORD and self._is_instruction(self._saved.rip - 2):
            self._instruction = self._saved.rip - 2
        elif not self._is_instruction(self._instruction):
            raise FerryError(Reason.VMM_FAILED, f"found no syscall instruction in the code of process {self.pid}")

    def _is_instruction(self, address: int) -> bool:
        found = ctypes.create_string_buffer(2)
        return _pread(self._memory, found, 2, address) == 2 and found.raw == INSTRUCTION

    def _prepare(self) -> None:
        """Have signals wait, and the process killed if this one ends now."""
        if not self._changed:
            self._request(_SETOPTIONS, _OPTION_SYSGOOD | _OPTION_EXITKILL)
            self._changed = True
            self._request(_SETSIGMASK, ctypes.byref(self._blocked), 8)

    def _run_to_syscall_stop(self, meanwhile: Callable[[], None] | None) -> None:
        """Go on to the next entry to a system call, or return from it. _LateError."""
        passed = 0
        while True:
            self._resume(_SYSCALL, passed)
            status = self._wait(_CALL_SECONDS, meanwhile)
            if status == _SYSCALL_STOP:
                return
            passed = self._signal_to_pass(status)
            if self._raised:
                name = signal.Signals(self._raised).name
                raise FerryError(Reason.VMM_FAILED, f"a system call injected into process {self.pid} raised {name}")

    def _await_event_stop(self) -> None:
        """Go on to the stop that was asked for, on the thread's way to user mode. _LateError."""
        while (status := self._wait(_STOP_SECONDS)) >> 8 != _EVENT_STOP:
            if status == _SYSCALL_STOP:
                # Before a call: do not make it. After it: nothing to restart. Either way other registers follow.
                self._used.orig_rax = _WORD
                self._request(_SETREGS, ctypes.byref(self._used))
            # Any other stop takes the request back.
            self._request(_INTERRUPT)
            self._resume(_CONT, self._signal_to_pass(status))

    def _signal_to_pass(self, status: int) -> int:
        """Return the signal to go on with from a stop. With changed registers no handler may run: they are kept."""
        if status >> 8 == _EVENT_STOP or status == _SYSCALL_STOP:
            return 0
        if not self._changed or status == signal.SIGSTOP:
            return status
        self._request(_GETSIGINFO, ctypes.byref(self._info))
        if self._info[_SI_CODE] > 0:
            self._raised = status
        else:
            self._held.append(status)
        return 0

    def _leave(self) -> None:
        """Restore and detach; whatever fails, no thread goes on with registers that are not its own."""
        try:
            if self._changed:
                self._restore()
            try:
                for number in self._held:
                    os.kill(self.pid, number)
            finally:
                self._detach()
        finally:
            memory, self._memory = self._memory, -1
            if memory >= 0:
                os.close(memory)

    def _restore(self) -> None:
        # The kernel handles an interrupted call on its way out of this stop, as it would have the first time.
        self._request(_INTERRUPT)
        if self._stands:
            self._resume(_CONT, 0)
        try:
            self._await_event_stop()
        except _LateError as error:
            raise FerryError(
                Reason.VMM_FAILED,
                f"process {self.pid} does not come back from a system call injected into it, so its registers cannot "
                "be restored: it is lost",
            ) from error
        for address, data in reversed(self._overwritten):
            self._write(address, data)
        self._request(_SETREGS, ctypes.byref(self._saved))
        self._request(_SETSIGMASK, ctypes.byref(self._mask), 8)
        self._request(_SETOPTIONS, _OPTION_SYSGOOD)
        self._changed = False

    def _detach(self) -> None:
        if self._attached and self._stands:
            self._request(_DETACH)
            self._attached = self._stands = False
            self.stopped_seconds = time.monotonic() - self._asked_at

    def _request(self, request: int, data: object = None, address: int | None = None) -> None:
        """Make one ptrace request of the attached thread."""
        if _ptrace(request, self.pid, address, data) >= 0:
            return
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            # It stood, and does not any more: it was killed, which the wait tells.
            with suppress(_LateError):
                self._wait(_STOP_SECONDS)
        raise FerryError(Reason.VMM_FAILED, f"ptrace of process {self.pid} failed: {os.strerror(number)}")

    def _resume(self, request: int, number: int) -> None:
        self._request(request, number)
        self._stands = False

    def _wait(self, seconds: float, meanwhile: Callable[[], None] | None = None) -> int:
        """Wait for the thread to stop; return why: a signal, with PTRACE_EVENT_* from bit 8 on. _LateError."""
        began = time.monotonic()
        while True:
            if _waitid(_P_PID, self.pid, ctypes.byref(self._info), _WSTOPPED | _WNOHANG | _WALL):
                raise self._gone()
            if self._info[0]:
                self._stands = True
                status: int = self._info[_SI_STATUS]
                return status
            waited = time.monotonic() - began
            if waited > seconds:
                raise _LateError
            if waited < _SPIN_SECONDS:
                _libc.sched_yield()
                continue
            if meanwhile is not None:
                meanwhile()
            time.sleep(_POLL_SECONDS)

    def _gone(self) -> FerryError:
        """Return the error for a process that ended. Its parent learns of it once its tracer has."""
        self._attached = self._stands = self._changed = False
        if status_fields(self.pid).get("PPid") != str(os.getpid()):
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | _WALL)
        return FerryError(Reason.VMM_GONE, f"process {self.pid} ended while its main thread was traced")


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _seen(pid: int) -> str:
    """Return the state of a thread that should have stopped, and what that means."""
    state = status_fields(pid).get("State", "")
    return f"{_WHY_LATE.get(state[:1], 'it is not known why')} (state {state or 'unknown'})"
