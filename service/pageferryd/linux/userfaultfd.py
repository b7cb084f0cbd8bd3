"""One userfaultfd: its faults and events come out, pages go in. See userfaultfd(2) and ioctl_userfaultfd(2).

Every operation that fills pages returns how many bytes are done and an Outcome. Where that is not INSTALLED, it is
about the page at `address + done`; nothing is known of those behind it. A Userfaultfd is used by one thread at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.userfaultfd import open_userfaultfd
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.linux.proc import open_files
from pageferryd.linux.userfault_events import Event, Fault, Fork, Remap, Remove, Unmap, parse_events

__all__ = ["Event", "Fault", "Fork", "Outcome", "Remap", "Remove", "Unmap", "Userfaultfd"]

# A bit of the kernel's own among the features that /proc shows: UFFDIO_API was called.
_AGREED = 1 << 31
_LINK = "anon_inode:[userfaultfd]"


class Outcome(Enum):
    """How filling pages ended."""

    INSTALLED = 1
    """All of the range is in place."""
    EXISTS = 2
    """Somebody was first. Wake the page: its waiter may have been missed."""
    RETRY = 3
    """The guest is changing its mappings and waits for its events to be read: read them, then again.

    That may have to be repeated: the kernel lifts the refusal a moment after the event was read.
    """
    GONE = 4
    """The process is gone, and its memory with it."""
    UNMAPPED = 5
    """The page is mapped or registered no longer, or lies beyond the end of its file. For `resolve_minor` also: the
    page is not in the file, because nobody wrote it or somebody discarded it since."""


_OUTCOMES: Mapping[int, Outcome] = {
    errno.EEXIST: Outcome.EXISTS,
    errno.EAGAIN: Outcome.RETRY,
    errno.ESRCH: Outcome.GONE,
    errno.ENOENT: Outcome.UNMAPPED,
    errno.EFAULT: Outcome.UNMAPPED,
}

_INSTALLED = Outcome.INSTALLED
_Attempt = Callable[[int, int], tuple[int, int]]
"""From (offset, size), both in bytes, to (bytes done, errno or 0)."""


class Userfaultfd:
    """A userfaultfd, owned by this object."""

    def __init__(self, fd: int) -> None:
        """Own `fd`, which must be non-blocking and have agreed on its API."""
        self._fd = fd
        self._copy = bytearray(abi.COPY.size)
        # ZEROPAGE, CONTINUE and POISON have structs of one form.
        self._fill = bytearray(abi.ZEROPAGE.size)
        self._range = bytearray(abi.RANGE.size)

    @classmethod
    def open(cls, features: int = 0, *, user_mode_only: bool = False) -> Self:
        """Make a userfaultfd for this process's own memory, with the UFFD_FEATURE_* bits asked for.

        `user_mode_only` needs no privilege, but accesses by the kernel (read(2) into the memory, a vCPU) then fail.
        FerryError: USERFAULTFD_UNAVAILABLE where the kernel lacks it or a feature, PERMISSION_MISSING.
        """
        return cls(open_userfaultfd(features, user_mode_only=user_mode_only))

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Take over a userfaultfd that another process made; make it non-blocking and close-on-exec.

        FerryError(HANDOFF_NO_FD) where `fd` is something else or not ready for use; it is then still the caller's.
        """
        _refuse_unless_userfaultfd(fd)
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        _refuse_unless_agreed(fd)
        return cls(fd)

    def fileno(self) -> int:
        """Return the descriptor; it becomes readable when there are events."""
        return self._fd

    def features(self) -> int:
        """Return the UFFD_FEATURE_* bits that its maker asked for, from /proc; 0 where the kernel does not tell."""
        with open(f"/proc/self/fdinfo/{self._fd}") as info:
            for line in info:
                if line.startswith("API:"):
                    return int(line.split(":")[2], 16) & ~_AGREED
        return 0

    def register(self, address: int, length: int, *, missing: bool = True, minor: bool = False) -> int:
        """Make faults in the range wait for this userfaultfd; bytes, page-aligned. FerryError(USERFAULTFD_REFUSED).

        Return the mask of `1 << _UFFDIO_*` operations that the range's memory supports.
        """
        mode = abi.UFFDIO_REGISTER_MODE_MISSING * missing | abi.UFFDIO_REGISTER_MODE_MINOR * minor
        argument = bytearray(abi.REGISTER.pack(address, length, mode, 0))
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_REGISTER, argument)
        except OSError as error:
            _refuse_range("register", error, address, length)
        operations: int = abi.REGISTER.unpack(argument)[3]
        return operations

    def unregister(self, address: int, length: int) -> None:
        """Let go of the range and wake its waiters. Its missing pages read as zeroes from now on.

        FerryError: USERFAULTFD_REFUSED where it cannot be, VMM_GONE where the process is gone.
        """
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_UNREGISTER, bytearray(abi.RANGE.pack(address, length)))
        except OSError as error:
            _refuse_range("unregister", error, address, length)

    def read_events(self, limit: int = 64) -> list[Event]:
        """Return up to `limit` waiting events; [] where there are none.

        FerryError(USERFAULTFD_REFUSED) where the kernel cannot hand an event over, as a FORK beyond the limit of files.
        """
        try:
            return parse_events(os.read(self._fd, abi.UFFD_MSG_SIZE * limit))
        except BlockingIOError:
            return []
        except OSError as error:
            raise FerryError(Reason.USERFAULTFD_REFUSED, f"cannot read events of a userfaultfd: {error}") from error

    def copy(self, address: int, source: int, length: int, *, wake: bool = True) -> tuple[int, Outcome]:
        """Install a copy of the bytes at `source`, an address in this process, which the caller keeps alive.

        Bytes, in whole pages of the backing memory. FerryError: NO_SPACE where the host has no memory for it,
        USERFAULTFD_REFUSED where the range is not whole pages.
        """
        mode = 0 if wake else abi.UFFDIO_COPY_MODE_DONTWAKE
        argument = self._copy
        abi.COPY.pack_into(argument, 0, address, source, length, mode, 0)
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_COPY, argument)
        except OSError as error:

            def attempt(offset: int, size: int) -> tuple[int, int]:
                abi.COPY.pack_into(argument, 0, address + offset, source + offset, size, mode, 0)
                return self._attempt(abi.UFFDIO_COPY, argument, size)

            return _go_on(attempt, length, _done(argument), error.errno or 0)
        return length, _INSTALLED

    def zero(self, address: int, length: int, *, wake: bool = True) -> tuple[int, Outcome]:
        """Install pages of zeroes. The kernel has this for anonymous memory and shmem only.

        Over hugetlbfs it is FerryError(USERFAULTFD_REFUSED), EINVAL: copy zeroes there. Otherwise as `copy`.
        """
        return self._fill_range(abi.UFFDIO_ZEROPAGE, address, length, 0 if wake else abi.UFFDIO_ZEROPAGE_MODE_DONTWAKE)

    def resolve_minor(self, address: int, length: int, *, wake: bool = True) -> tuple[int, Outcome]:
        """Map pages that are in the page cache already (UFFDIO_CONTINUE), written through another mapping."""
        return self._fill_range(abi.UFFDIO_CONTINUE, address, length, 0 if wake else abi.UFFDIO_CONTINUE_MODE_DONTWAKE)

    def poison(self, address: int, length: int, *, wake: bool = True) -> tuple[int, Outcome]:
        """Make the pages fail with SIGBUS (a machine check in a virtual machine) when touched. Needs Linux 6.6."""
        return self._fill_range(abi.UFFDIO_POISON, address, length, 0 if wake else abi.UFFDIO_POISON_MODE_DONTWAKE)

    def wake(self, address: int, length: int) -> None:
        """Let the waiters of the range look again, though nothing was installed for them."""
        abi.RANGE.pack_into(self._range, 0, address, length)
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_WAKE, self._range)
        except OSError as error:
            _refuse_range("wake", error, address, length)

    def close(self) -> None:
        """Let the descriptor go. Twice does nothing.

        With the last descriptor every range is unregistered: each of its pages must be installed before.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _fill_range(self, request: int, address: int, length: int, mode: int) -> tuple[int, Outcome]:
        argument = self._fill
        abi.ZEROPAGE.pack_into(argument, 0, address, length, mode, 0)
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:

            def attempt(offset: int, size: int) -> tuple[int, int]:
                abi.ZEROPAGE.pack_into(argument, 0, address + offset, size, mode, 0)
                return self._attempt(request, argument, size)

            return _go_on(attempt, length, _done(argument), error.errno or 0)
        return length, _INSTALLED

    def _attempt(self, request: int, argument: bytearray, size: int) -> tuple[int, int]:
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            return _done(argument), error.errno or 0
        return size, 0


def _done(argument: bytearray) -> int:
    """Return the bytes done: the last word of each of the structs, which holds a negative errno where none were."""
    return max(0, int.from_bytes(argument[-8:], "little", signed=True))


def _go_on(attempt: _Attempt, length: int, done: int, number: int) -> tuple[int, Outcome]:
    """Finish what stopped early, after `done` bytes and with errno `number`, or find out why it cannot be finished.

    The kernel reports every partial success as EAGAIN; only another attempt tells the reason. And it says ENOENT of a
    range that lies in two mappings, as after an mprotect(2) or madvise(2) of a part, so that smaller ranges are tried.
    """
    got, size = done, length
    while True:
        if got:
            size = length - done
        elif number == errno.ENOENT and size > PAGE_SIZE:
            # Powers of two, so that huge pages are not cut.
            size = 1 << (size - 1).bit_length() - 1
        else:
            return done, _outcome(number)
        got, number = attempt(done, size)
        done += got
        if done == length:
            return done, _INSTALLED


def _outcome(number: int) -> Outcome:
    outcome = _OUTCOMES.get(number)
    if outcome is None:
        reason = Reason.NO_SPACE if number in (errno.ENOMEM, errno.ENOSPC) else Reason.USERFAULTFD_REFUSED
        raise FerryError(reason, f"the kernel could not install a page of the guest: {os.strerror(number)}")
    return outcome


def _refuse_range(verb: str, error: OSError, address: int, length: int) -> NoReturn:
    what = f"cannot {verb} {length} bytes at {address:#x} with a userfaultfd: {error.strerror}"
    # For a process that is gone these calls answer ENOMEM, where filling pages answers ESRCH.
    if error.errno in (errno.ESRCH, errno.ENOMEM):
        raise FerryError(Reason.VMM_GONE, f"{what}; has its process ended?") from error
    if error.errno == errno.EBUSY:
        what += "; another userfaultfd watches it already"
    raise FerryError(Reason.USERFAULTFD_REFUSED, what) from error


def is_userfaultfd(fd: int) -> bool:
    """Say whether an open descriptor is a userfaultfd."""
    return _target(fd) == _LINK


def _target(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def find_userfaultfd(pid: int) -> int:
    """Return the number of the one userfaultfd that a process holds. FerryError: VMM_GONE, HANDOFF_NO_FD."""
    found = [number for number, link in open_files(pid).items() if link == _LINK]
    if len(found) != 1:
        raise FerryError(Reason.HANDOFF_NO_FD, f"process {pid} holds {len(found)} userfaultfds where one is expected")
    return found[0]


def _refuse_unless_userfaultfd(fd: int) -> None:
    try:
        target = _target(fd)
    except OSError as error:
        raise FerryError(
            Reason.HANDOFF_NO_FD, f"file descriptor {fd} was handed over, but is not open: {error.strerror}"
        ) from error
    if target != _LINK:
        raise FerryError(
            Reason.HANDOFF_NO_FD,
            f"a file descriptor was handed over that is no userfaultfd but {target}; is the VMM right?",
        )


def _refuse_unless_agreed(fd: int) -> None:
    """A userfaultfd without an agreed API polls as an error, like one that blocks."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise FerryError(Reason.HANDOFF_NO_FD, "a userfaultfd was handed over before its maker called UFFDIO_API")
