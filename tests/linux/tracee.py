"""A program that the tests of ptrace stop and have make system calls; and, as `Child`, the test's end of it.

Run as `tracee.py WHAT [ARGUMENT ...]`: it does the one thing named, and prints what came of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

DEADLINE = 10.0
PAGE = 4096
READ, POLL, MADVISE, FUTEX, CLOCK_NANOSLEEP, PPOLL = 0, 7, 28, 202, 230, 271
SECONDS = 1.0

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# uint64 sum(uint64 n, double *floating): n + … + 1 in rax by way of the red zone, and in xmm1. It gives 0 where r11 or
# r8, which a system call and a function may change, are not what they were.
SUM = (
    "31c0 4889f9 660fefc9 4989fb"  # xor eax,eax; mov rcx,rdi; pxor xmm1,xmm1; mov r11,rdi
    "48894c24f8 4889442480 48034424f8"  # again: mov [rsp-8],rcx; mov [rsp-128],rax; add rax,[rsp-8]
    "f2480f2ac1 f20f58c8"  # cvtsi2sd xmm0,rcx; addsd xmm1,xmm0
    "4d89d8 4939f8 750a"  # mov r8,r11; cmp r8,rdi; jne changed
    "48ffc9 75db f20f110e c3"  # dec rcx; jne again; movsd [rsi],xmm1; ret
    "31c0 c3"  # changed: xor eax,eax; ret
)
# Goes over to 32-bit code, which does nothing for ever.
IN_32_BITS = "6a23 68{} 48cb ebfe"  # push 0x23; push here+9; retfq; here+9: jmp .


class Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class Child:
    """The program, run; ended, whatever state it is in, at the end of a `with`."""

    def __init__(self, *command: object, fds: tuple[int, ...] = ()) -> None:
        line = [sys.executable, __file__, *map(str, command)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds)
        self.pid = self.process.pid
        self.first = self.answer()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE)[0], "no answer"
        return self.process.stdout.readline().decode().strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def await_call(self, number: int) -> Self:
        """Wait until the main thread stands in a system call."""
        until(lambda: Path(f"/proc/{self.pid}/syscall").read_text().split()[0] == str(number))
        return self

    def status(self, field: str) -> str:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))

    def descriptors(self) -> set[str]:
        return {f"{fd.name} {fd.readlink()}" for fd in Path(f"/proc/{self.pid}/fd").iterdir()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def say(*words: object) -> None:
    print(*words, flush=True)


def code(assembled: str, flags: int = 0) -> int:
    """Return the address of new memory that holds the machine code."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    address: int = libc.mmap(None, PAGE, protection, flags | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    behind_jump = (address + 9 & 0xFFFFFFFF).to_bytes(4, "little")
    machine_code = bytes.fromhex(assembled.format(behind_jump.hex()))
    ctypes.memmove(address, machine_code, len(machine_code))
    return address


def timed(call: Callable[[], int]) -> None:
    say("ready")
    began = time.monotonic()
    result = call()
    say(result, ctypes.get_errno(), time.monotonic() - began >= SECONDS)


def nanosleep() -> None:
    left = Timespec()
    timed(lambda: libc.nanosleep(ctypes.byref(Timespec(int(SECONDS), 0)), ctypes.byref(left)))


def futex() -> None:
    word, limit = ctypes.c_int(7), Timespec(int(SECONDS), 0)
    timed(lambda: libc.syscall(FUTEX, ctypes.addressof(word), 0, 7, ctypes.addressof(limit), None))


def poll() -> None:
    timed(lambda: libc.poll((ctypes.c_int * 2)(0, select.POLLIN), 1, int(SECONDS * 1000)))


def read() -> None:
    """Read a line by a bare read(2), again and again; say its result and errno."""
    say("ready")
    buffer = ctypes.create_string_buffer(64)
    while (length := libc.read(0, buffer, 64)) != 0:
        say(length, ctypes.get_errno())


def spin() -> None:
    """Calculate in user mode; when there is input, say how many sums were made and how many were wrong."""
    calculate = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)(code(SUM))
    floating = ctypes.c_double()
    rounds = wrong = 0
    n, right = 200_000, 200_000 * 200_001 // 2
    say("ready")
    while not select.select([0], [], [], 0)[0]:
        total = calculate(n, ctypes.addressof(floating))
        wrong += (total, floating.value) != (right, float(right))
        rounds += 1
    say(rounds, wrong)


def threads(fd: str) -> None:
    """Read as above; two other threads send back what comes on a socket."""

    def echo() -> None:
        while data := os.read(int(fd), 64):
            os.write(int(fd), data)

    for _ in range(2):
        threading.Thread(target=echo, daemon=True).start()
    read()


def handler() -> None:
    """Answer a line with what signals came so far."""
    heard, told = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(told)
    for number in (signal.SIGUSR1, signal.SIGSEGV, signal.SIGRTMIN):
        signal.signal(number, lambda *_: None)
    say("ready")
    seen: Counter[int] = Counter()
    while os.read(0, 64):
        if select.select([heard], [], [], 0)[0]:
            seen.update(os.read(heard, 64))
        say(*(f"{signal.Signals(number).name}={count}" for number, count in sorted(seen.items())))


def within() -> None:
    """Let SIGUSR1 in within ppoll alone; say the errno, whether the handler ran, whether it is blocked again."""
    ran: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: ran.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    none = ctypes.c_uint64(0)
    say("ready")
    libc.ppoll(None, 0, None, ctypes.byref(none))
    blocked = signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    say(ctypes.get_errno(), len(ran), blocked)


def without_privilege(user: str, free_descriptors: str) -> None:
    """Read, as another user, or as root without CAP_SYS_PTRACE, and with so many descriptors more."""
    if int(user):
        os.setresuid(int(user), int(user), int(user))
    else:
        capabilities = (ctypes.c_uint32 * 6)()
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert libc.capget(header, capabilities) == 0
        capabilities[0] &= ~(1 << 19)
        assert libc.capset(header, capabilities) == 0
    lowest = os.dup(0)
    os.close(lowest)
    limit = lowest + int(free_descriptors)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    read()


def memory(pages: str, locked: str) -> None:
    """Say where private pages full of ones are; answer a line with the first byte of each."""
    length = int(pages) * PAGE
    held = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[:] = b"\1" * length
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    if int(locked):
        assert libc.mlock(address, length) == 0
    say(address)
    while os.read(0, 64):
        say(*(held[at] for at in range(0, length, PAGE)))


def stuck() -> None:
    """Wait in the kernel, uninterruptibly, until there is input: for the event of a discard to be read."""
    from pageferry.abi import userfaultfd as abi
    from pageferry.vmm.memory import GuestMemory
    from pageferryd.linux.userfaultfd import Userfaultfd

    guest = GuestMemory(PAGE)
    uffd = Userfaultfd.open(abi.UFFD_FEATURE_EVENT_REMOVE)
    uffd.register(guest.address, PAGE)

    def release() -> None:
        os.read(0, 64)
        uffd.read_events()

    threading.Thread(target=release, daemon=True).start()
    say("ready")
    say(libc.madvise(guest.address, PAGE, mmap.MADV_DONTNEED))


def tracer(pid: str) -> None:
    """Trace another process until there is input."""
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    assert libc.ptrace(0x4206, int(pid), None, None) == 0
    say("ready")
    os.read(0, 64)


def parent() -> None:
    """Have a child of its own; say its id, and when it ended, how."""
    with Child("read") as child:
        say(child.pid)
        say(child.process.wait())


def bits_32() -> None:
    run = ctypes.CFUNCTYPE(None)(code(IN_32_BITS, getattr(mmap, "MAP_32BIT", 0x40)))
    say("ready")
    run()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
