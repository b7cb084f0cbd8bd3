"""How the bytes of a guest are read while its VMM still holds them: from the VMM's memory, its memfd, or a file."""

from __future__ import annotations

import errno
import os
import stat
from typing import Protocol

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.linux.held_files import holds_file, may_read
from pageferryd.linux.holes import Extents, ProcessPages, file_extents
from pageferryd.linux.pidfd import PidFd
from pageferryd.source.mappings import is_dying, is_mapped, mappings

# What reading a poisoned page fails with.
_POISONED = frozenset({errno.EIO, errno.EFAULT})
_ENDING_SECONDS = 0.5


class RegionReader(Protocol):
    """Something that holds the bytes of regions; `at` and lengths are in bytes, within a range that was checked."""

    def check(self, at: int, length: int) -> bool:
        """Say whether holes in the range can be looked up; call it once before reading a range.

        FerryError: LAYOUT_MISMATCH or MEMORY_UNREADABLE where the bytes of the range do not exist.
        """
        ...

    def read(self, at: int, length: int) -> bytes:
        """Return the first bytes of the range, at least one.

        OSError where the first of them lies in a page that cannot be read (poisoned); FerryError(VMM_GONE) or
        FerryError(MEMORY_UNREADABLE) where the memory is there no longer.
        """
        ...

    def extents(self, at: int, length: int) -> Extents:
        """Find data and holes, without reading them. Whole pages where `at` and `length` are."""
        ...

    def close(self) -> None:
        """Let everything go."""
        ...


class FileReader:
    """A memory file or a memfd. It stays readable when the VMM is gone."""

    def __init__(self, fd: int, name: str) -> None:
        """Own `fd`; its file position must be nobody else's. `name` is for errors."""
        self._fd = fd
        self._name = name
        self._size = os.fstat(fd).st_size

    @classmethod
    def open(cls, process: PidFd, path: str) -> FileReader:
        """Open a VMM's memory file, which it must have open or mapped.

        FerryError: MEMORY_UNREADABLE, PERMISSION_MISSING, VMM_GONE, MEMORY_NOT_ITS_OWN.
        """
        name = f"memory file {path}"
        fd = _open_regular(path, name)
        try:
            # Of what was opened: by its name another file could be found a moment later.
            _refuse_unless_held(process, fd, name)
            return cls(fd, name)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def take(cls, process: PidFd, number: int) -> FileReader:
        """Open the file behind a VMM's descriptor, a memfd. FerryError as in `open`."""
        name = f"file descriptor {number} of process {process.pid}"
        taken = process.get_fd(number)
        try:
            if not may_read(taken):
                raise _foreign(process.pid, name, "has not opened it for reading")
            # Opened anew, because a duplicate would share its file position with the VMM.
            return cls(_open_regular(f"/proc/self/fd/{taken}", name), name)
        finally:
            os.close(taken)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def check(self, at: int, length: int) -> bool:
        """See RegionReader."""
        if at + length > self._size:
            raise FerryError(
                Reason.LAYOUT_MISMATCH,
                f"{self._name} is too short: {self._size} bytes, but the guest's memory needs {at + length}",
            )
        return True

    def read(self, at: int, length: int) -> bytes:
        """See RegionReader."""
        try:
            return os.pread(self._fd, length, at) or self._refuse_shrunken()
        except OSError as error:
            if error.errno in _POISONED:
                raise
            raise FerryError(Reason.MEMORY_UNREADABLE, f"cannot read {self._name} at {at}: {error.strerror}") from error

    def extents(self, at: int, length: int) -> Extents:
        """See RegionReader."""
        found = file_extents(self._fd, at, length)
        # The space beyond the end looks like a hole.
        if os.fstat(self._fd).st_size < at + length:
            self._refuse_shrunken()
        return Extents(_whole_pages(found.data, at), found.end)

    def close(self) -> None:
        """See RegionReader."""
        os.close(self._fd)

    def _refuse_shrunken(self) -> bytes:
        raise FerryError(
            Reason.MEMORY_UNREADABLE, f"{self._name} was cut short while the guest's memory was read from it"
        )


class ProcessReader:
    """The private memory of a VMM; `at` are addresses in it."""

    def __init__(self, process: PidFd) -> None:
        """Open the memory of a process, which remains the caller's. FerryError: VMM_GONE, PERMISSION_MISSING."""
        self._pid = process.pid
        self._memory = _open_of_process(process.pid, "mem")
        try:
            self._pagemap = _open_of_process(process.pid, "pagemap")
        except BaseException:
            os.close(self._memory)
            raise
        self._pages = ProcessPages(self._pagemap)
        if process.exited:
            # What was opened may be of a later process with the same id.
            self.close()
            raise _gone(process.pid)

    def check(self, at: int, length: int) -> bool:
        """See RegionReader. Holes are known in private anonymous memory."""
        found = mappings(self._pid, at, at + length)
        if at % PAGE_SIZE or not is_mapped(found, at, at + length):
            raise FerryError(
                Reason.LAYOUT_MISMATCH,
                f"process {self._pid} has no readable memory of whole pages at {at:#x} to {at + length:#x}, where the "
                "guest's should be",
            )
        return all(one.private_anonymous for one in found)

    def read(self, at: int, length: int) -> bytes:
        """See RegionReader."""
        try:
            content = os.pread(self._memory, length, at)
        except OSError as error:
            self._explain(error, at)
            raise
        if not content:
            raise _gone(self._pid)
        return content

    def extents(self, at: int, length: int) -> Extents:
        """See RegionReader."""
        try:
            found = self._pages.extents(at, length)
        except ProcessLookupError as error:
            raise _gone(self._pid) from error
        except OSError as error:
            raise FerryError(
                Reason.MEMORY_UNREADABLE, f"cannot look for holes in the memory of process {self._pid}: {error}"
            ) from error
        hole = _first_hole(found, at)
        if hole < found.end and not self._is_stable(hole):
            # Let reading each page decide.
            return Extents([(at, at + length)], at + length)
        if found.end <= at:
            raise _gone(self._pid)
        return found

    def close(self) -> None:
        """See RegionReader."""
        os.close(self._memory)
        os.close(self._pagemap)

    def _is_stable(self, hole: int) -> bool:
        """Say whether a page that seems never filled is one indeed.

        The pages of a process that ends, that the OOM killer has taken them from, or that has unmapped them, seem
        never filled as well. But then the kernel refuses to let such a page be read.
        """
        try:
            return bool(self.read(hole, 1))
        except OSError:
            return False

    def _explain(self, error: OSError, at: int) -> None:
        """Raise FerryError where a page cannot be read for another reason than being poisoned."""
        if error.errno not in _POISONED:
            raise FerryError(
                Reason.MEMORY_UNREADABLE, f"cannot read the memory of process {self._pid} at {at:#x}: {error}"
            ) from error
        if is_dying(self._pid):
            raise _gone(self._pid) from error
        page = at - at % PAGE_SIZE
        if not is_mapped(mappings(self._pid, page, page + PAGE_SIZE), page, page + PAGE_SIZE):
            raise FerryError(
                Reason.MEMORY_UNREADABLE, f"process {self._pid} has unmapped the guest's memory at {at:#x}"
            ) from error


def _first_hole(found: Extents, at: int) -> int:
    for start, end in found.data:
        if start > at:
            break
        at = end
    return at


def _whole_pages(extents: list[tuple[int, int]], base: int) -> list[tuple[int, int]]:
    """Widen extents to whole pages, counted from `base`: a file system may have smaller blocks."""
    whole: list[tuple[int, int]] = []
    for start, end in extents:
        start -= (start - base) % PAGE_SIZE
        end += (base - end) % PAGE_SIZE
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], end)
        else:
            whole.append((start, end))
    return whole


def _gone(pid: int) -> FerryError:
    return FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) is gone, and the guest's memory with it")


def _refuse_unless_held(process: PidFd, fd: int, name: str) -> None:
    """Refuse what a VMM names and has not: this process may open files that the VMM may not."""
    held = holds_file(process.pid, fd)
    # What was found may be of a later process with the same id; and one that ends lets its files go a moment before.
    if process.wait(0 if held else _ENDING_SECONDS):
        raise _gone(process.pid)
    if not held:
        raise _foreign(process.pid, name, "has neither mapped it nor opened it for reading")


def _foreign(pid: int, name: str, why: str) -> FerryError:
    return FerryError(
        Reason.MEMORY_NOT_ITS_OWN,
        f"{name} is not the memory of the VMM (process {pid}), which {why}: a VMM names its guest's own memory, and "
        "keeps it mapped",
    )


def _open_regular(path: str, name: str) -> int:
    try:
        # Non-blocking, in case that it is a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING, f"{name} is not readable: give this user read access to it"
        ) from error
    except OSError as error:
        raise FerryError(Reason.MEMORY_UNREADABLE, f"cannot open {name}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FerryError(Reason.MEMORY_UNREADABLE, f"{name} is neither a regular file nor a memfd")
    return fd


def _open_of_process(pid: int, name: str) -> int:
    try:
        return os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"/proc/{pid}/{name} is not readable: run with CAP_SYS_PTRACE, or as the same user with "
            "kernel.yama.ptrace_scope at 0",
        ) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _gone(pid) from error
    except OSError as error:
        raise FerryError(Reason.MEMORY_UNREADABLE, f"cannot open /proc/{pid}/{name}: {error.strerror}") from error
