"""Looking at another process in /proc: what its errors mean, and the files that it has open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pageferry.errors import FerryError, Reason


@contextlib.contextmanager
def looking_at(pid: int, name: str) -> Iterator[None]:
    """Raise what reading /proc/PID/`name` fails with as FerryError: VMM_GONE, PERMISSION_MISSING."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) is gone") from error
    except OSError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING,
            f"/proc/{pid}/{name} is not readable ({error.strerror}): run with CAP_SYS_PTRACE, or as the same user",
        ) from error


def mapping_lines(pid: int) -> list[str]:
    """Return the lines of proc_pid_maps(5). FerryError as in `looking_at`."""
    with looking_at(pid, "maps"):
        # The kernel masks no end of a line but this one in the names of files, which the process chooses.
        return Path(f"/proc/{pid}/maps").read_bytes().decode(errors="surrogateescape").split("\n")[:-1]


def open_files(pid: int) -> dict[int, str]:
    """Return what each file descriptor of a process is, as its link in /proc says. FerryError as in `looking_at`."""
    found: dict[int, str] = {}
    with looking_at(pid, "fd"):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            # One that was closed meanwhile is none.
            with contextlib.suppress(FileNotFoundError):
                found[int(entry.name)] = str(entry.readlink())
    return found


def started_at(pid: int) -> int:
    """Return when a process was started, in ticks since the host was: with its id, that tells it from any other.

    Field 22 of proc_pid_stat(5). FerryError as in `looking_at`.
    """
    return int(_stat(pid)[22 - 3])


def _stat(pid: int) -> list[bytes]:
    """Return the fields of proc_pid_stat(5) from the third, the state, on."""
    with looking_at(pid, "stat"):
        content = Path(f"/proc/{pid}/stat").read_bytes()
    # The name in parentheses may hold anything.
    return content[content.rindex(b")") + 2 :].split()


def is_process(pid: int, started: int) -> bool:
    """Say whether the process of that id that was started then lives: a zombie has ended."""
    try:
        fields = _stat(pid)
    except FerryError:
        return False
    return int(fields[22 - 3]) == started and fields[0] not in (b"Z", b"X")
