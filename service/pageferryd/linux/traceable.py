"""What /proc says of another process that is to be traced: where its code has a system call, and why it refuses."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from pageferry.errors import FerryError, Reason

INSTRUCTION = b"\x0f\x05"
"""The x86-64 instruction `syscall`."""

_SEARCHED_BYTES = 64 << 20
_PIECE = 1 << 20
_USER_ADDRESSES = 1 << 47


def find_instruction(pid: int, memory: int) -> int:
    """Return the address of a `syscall` instruction of the process, in the vDSO if it can be; 0 where none is found."""
    mappings = []
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        span, permissions = line.split()[:2]
        first, last = (int(address, 16) for address in span.split("-"))
        if permissions[2] == "x" and last <= _USER_ADDRESSES:
            mappings.append((not line.endswith("[vdso]"), first, last))
    left = _SEARCHED_BYTES
    for _, first, last in sorted(mappings):
        for address in range(first, min(last, first + left), _PIECE):
            # A mapping that cannot be read is passed over.
            with suppress(OSError):
                found = os.pread(memory, min(_PIECE, last - address), address).find(INSTRUCTION)
                if found >= 0:
                    return address + found
        left -= min(left, last - first)
    return 0


def status_fields(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status, none where there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def refusal(pid: int, error: OSError) -> FerryError:
    """Return why a process cannot be attached to."""
    status = status_fields(pid)
    if error.errno in (errno.ESRCH, errno.ENOENT) or status.get("State", "Z")[0] in "ZX":
        return FerryError(Reason.VMM_GONE, f"cannot attach to process {pid}: it does not run (any more)")
    if status.get("TracerPid", "0") != "0":
        return FerryError(
            Reason.VMM_FAILED,
            f"cannot attach to process {pid}: it is being traced by process {status['TracerPid']}, a debugger or "
            "strace; end that first",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return FerryError(
            Reason.PERMISSION_MISSING,
            f"cannot attach to process {pid}: not permitted; run with CAP_SYS_PTRACE, or as the same user with the "
            "sysctl kernel.yama.ptrace_scope at 0",
        )
    return FerryError(Reason.VMM_FAILED, f"cannot attach to process {pid}: {error}")
