"""Descriptors of one migration that must outlive this process: stored with its manager, and found in the VMM again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.proc import open_files
from pageferryd.linux.userfaultfd import find_userfaultfd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pageferryd.linux.fd_store import FdStore

_log = structlog.get_logger(__name__)

FileId = tuple[int, int]
"""Device and inode."""

USERFAULTFD = "uffd"
"""Name of the one descriptor that is found by what it is: all of its kind have one inode."""


def file_ids(descriptors: Mapping[str, int]) -> dict[str, FileId]:
    """Return by what the files behind descriptors can be found in another process."""
    return {name: _file_id(os.fstat(fd)) for name, fd in descriptors.items()}


class Kept:
    """One migration's. Where nobody stores for this process, a later one looks in the VMM alone."""

    def __init__(self, store: FdStore, migration_id: str) -> None:
        self._store = store
        self._migration_id = migration_id
        self._names: set[str] = set()

    async def keep(self, descriptors: Mapping[str, int]) -> None:
        """Store descriptors by name. A store that takes none is no reason to stop: the VMM has them, too."""
        for name, fd in descriptors.items():
            try:
                await asyncio.to_thread(self._store.keep, self._stored(name), fd)
                self._names.add(name)
            except FerryError as error:
                _log.warning("descriptor_not_stored", migration=self._migration_id, name=name, detail=error.message)

    def take(self, names: Iterable[str]) -> dict[str, int]:
        """Return what an earlier sidecar stored under these names; the caller owns it."""
        found: dict[str, int] = {}
        for name in names:
            self._names.add(name)
            for fd in self._store.take(self._stored(name)):
                if name in found:
                    os.close(fd)
                else:
                    found[name] = fd
        return found

    async def drop(self) -> None:
        """Nobody needs them any more."""
        names, self._names = self._names, set()
        for name in names:
            try:
                await asyncio.to_thread(self._store.drop, self._stored(name))
            except FerryError as error:
                _log.warning("descriptor_not_dropped", migration=self._migration_id, name=name, detail=error.message)

    def _stored(self, name: str) -> str:
        return f"{self._migration_id}.{name}"


def find_in(pid: int, wanted: Mapping[str, FileId]) -> dict[str, int]:
    """Return duplicates of a process's descriptors by name, which the caller owns.

    FerryError: VMM_GONE, PERMISSION_MISSING, HANDOFF_NO_FD.
    """
    found: dict[str, int] = {}
    try:
        with PidFd(pid) as process:
            for name, file_id in wanted.items():
                number = find_userfaultfd(pid) if name == USERFAULTFD else _find(pid, name, file_id)
                found[name] = process.get_fd(number)
    except BaseException:
        for fd in found.values():
            os.close(fd)
        raise
    return found


def _find(pid: int, name: str, wanted: FileId) -> int:
    for number in open_files(pid):
        try:
            if _file_id(Path(f"/proc/{pid}/fd/{number}").stat()) == wanted:
                return number
        except OSError:
            # It was closed meanwhile.
            continue
    raise FerryError(
        Reason.HANDOFF_NO_FD,
        f"the VMM (process {pid}) has closed its {name} descriptor, and no store has kept it: its guest's memory "
        "cannot be taken again; the guest waits",
    )


def _file_id(found: os.stat_result) -> FileId:
    return found.st_dev, found.st_ino
