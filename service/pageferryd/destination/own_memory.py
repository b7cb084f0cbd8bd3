"""Whether what came over a hand-off is the memory of the VMM that sent it.

A descriptor is a right that its sender has, whatever it is of. But a guest's pages go into it, and its VMM is what is
watched, killed and asked: so it must be that process's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pageferry.errors import FerryError, Reason
from pageferryd.linux.held_files import holds_file
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.watched_memory import watched_in, watches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferryd.destination.handed_over import Handoff

_ENDING_SECONDS: Final = 0.5


def refuse_foreign_memory(handoff: Handoff, files: Sequence[int], pid: int) -> None:
    """Raise FerryError(MEMORY_NOT_ITS_OWN) unless what was handed over is memory of process `pid`. Changes nothing.

    It takes milliseconds, and half a second before a refusal. The userfaultfd, if any, must watch all regions, in that
    process; `files`, the descriptors beside it, must be open or mapped there. FerryError also: VMM_GONE,
    PERMISSION_MISSING.
    """
    with PidFd(pid) as process:
        why = _what_is_foreign(handoff, files, pid)
        if not why:
            return
        # A process that ends has no memory and no files any more, a moment before it has ended.
        if process.wait(_ENDING_SECONDS):
            raise FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) ended as it handed its memory over")
        raise FerryError(
            Reason.MEMORY_NOT_ITS_OWN, f"the hand-off of the VMM (process {pid}) is not of its own memory: {why}"
        )


def _what_is_foreign(handoff: Handoff, files: Sequence[int], pid: int) -> str:
    """Return what is wrong, or nothing."""
    if not all(holds_file(pid, fd) for fd in files):
        return "a memory file is neither open nor mapped there: the VMM must keep what it hands over"
    if handoff.uffd is None:
        return ""
    regions = handoff.addresses.layout.regions
    ranges = [(at, one.size) for at, one in zip(handoff.addresses.addresses, regions, strict=True)]
    if not watched_in(pid, ranges):
        return "a userfaultfd does not watch all of its regions there: register them before the hand-off"
    for (at, size), region in zip(ranges, regions, strict=True):
        for page in (at, at + size - region.page_size):
            if not watches(handoff.uffd.fileno(), page, region.page_size):
                return f"the userfaultfd watches nothing at {page:#x}: it was made by another process"
    return ""
