"""Taking a waiting QEMU's memory from outside: it makes a userfaultfd, which is used from here.

All operations of a userfaultfd act on the process that made it, whoever issues them; so QEMU's main thread stands only
for the one system call that makes it. Its own copy stays open until the guest needs the pager no longer: should the
sidecar end before that, the guest waits, and another sidecar can take the userfaultfd again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import structlog

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError
from pageferry.userfaultfd import agree
from pageferryd.linux.filled import filled
from pageferryd.linux.mapped_files import punch_holes
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.ptrace import Tracee, traced
from pageferryd.linux.remote_calls import close_descriptor, discard, make_userfaultfd
from pageferryd.linux.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from pageferryd.vmm.qemu.blocks import RamBlock

_log = structlog.get_logger(__name__)

_FEATURES = abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MISSING_HUGETLBFS | abi.UFFD_FEATURE_EVENT_REMOVE
_OPTIONAL = abi.UFFD_FEATURE_POISON
_MOST_AT_ONCE = 32 << 20
"""Bytes that QEMU's main thread drops while it stands once: some hundred microseconds where all of it is there."""
_T = TypeVar("_T")


class Attached(NamedTuple):
    """A userfaultfd over a QEMU's memory: our descriptor, and the number of its own one."""

    uffd: int
    remote: int


def attach(pid: int, blocks: Sequence[RamBlock]) -> Attached:
    """Guard the blocks of a waiting QEMU, and empty them. Blocks for some milliseconds.

    On failure nothing of it is left in QEMU. FerryError: PERMISSION_MISSING, USERFAULTFD_*, VMM_GONE, VMM_FAILED.
    """
    with PidFd(pid) as process, contextlib.ExitStack() as undo:
        remote, stood = _remotely(pid, make_userfaultfd)
        undo.callback(_close_quietly, pid, remote)
        fd = process.get_fd(remote)
        undo.callback(os.close, fd)
        agree(fd, _FEATURES, optional=_OPTIONAL)
        uffd = Userfaultfd(fd)
        for block in blocks:
            uffd.register(block.host_address, block.size)
            undo.callback(_unregister_quietly, uffd, block)
        for block in blocks:
            stood = max(stood, _empty(pid, uffd, block))
        undo.pop_all()
    _log.info("qemu_attached", pid=pid, blocks=len(blocks), longest_stop_us=round(stood * 1e6))
    return Attached(fd, remote)


def detach(pid: int, remote: int) -> None:
    """Have QEMU close its own copy: only when every page is in. FerryError as in Tracee."""
    _remotely(pid, lambda tracee: close_descriptor(tracee, remote))


def _empty(pid: int, uffd: Userfaultfd, block: RamBlock) -> float:
    """Drop what the block holds; return how long the main thread stood at most for that."""
    if block.is_shared:
        punch_holes(pid, block.host_address, block.size)
        return 0.0
    longest = 0.0
    for start, end in filled(pid, block.host_address, block.size):
        for at in range(start, end, _MOST_AT_ONCE):
            part = min(_MOST_AT_ONCE, end - at)
            work = partial(discard, address=at, length=part, meanwhile=lambda: _swallow(uffd))
            longest = max(longest, _remotely(pid, work)[1])
    return longest


def _swallow(uffd: Userfaultfd) -> None:
    """Read what the kernel waits for to be read: that the pages are dropped."""
    uffd.read_events()


def _remotely(pid: int, work: Callable[[Tracee], _T]) -> tuple[_T, float]:
    """Have QEMU's main thread do something; return what that returned, and how long the thread stood."""
    tracees: list[Tracee] = []

    def noted(tracee: Tracee) -> _T:
        tracees.append(tracee)
        return work(tracee)

    result = traced(pid, noted)
    return result, tracees[0].stopped_seconds


def _close_quietly(pid: int, remote: int) -> None:
    with contextlib.suppress(FerryError):
        detach(pid, remote)


def _unregister_quietly(uffd: Userfaultfd, block: RamBlock) -> None:
    with contextlib.suppress(FerryError):
        uffd.unregister(block.host_address, block.size)
