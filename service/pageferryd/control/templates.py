"""VMMs that the sidecar starts itself, from a command of its settings, for guests that come and have none waiting."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control.launched import Launched

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pageferryd.config import Template
    from pageferryd.control.record import MigrationRecord
    from pageferryd.control.registry import Guest, GuestRegistry

_log = structlog.get_logger(__name__)

_MAX_SOCKET_PATH = 107
_FIRST_LOOK_SECONDS = 0.02
_LONGEST_LOOK_SECONDS = 0.5
_TRIM_SECONDS = 2.0
_END_SECONDS = 5.0
_CLEAN_UP_SECONDS = 15.0
"""How long a migration may take to let go of a VMM once it has ended; killing one takes the most of it."""
# What a VMM that is still coming up says.
_NOT_YET = (Reason.VMM_UNREACHABLE, Reason.VMM_FAILED)


@dataclass(eq=False)
class StartedVmm:
    """A VMM that was started for a guest, which is registered with it."""

    guest: Guest
    process: Launched
    kept: bool = False
    """Whether the guest may have run in it: then it ends with the guest, and not with the migration."""
    record: MigrationRecord | None = None
    attending: asyncio.Task[None] | None = field(default=None, repr=False)


class VmmStarter:
    """Starts VMMs from templates and watches over them. `most` may wait for their guests at once."""

    def __init__(self, templates: Sequence[Template], guests: GuestRegistry, runtime_dir: Path, most: int) -> None:
        self._templates = templates
        self._guests = guests
        self._runtime_dir = runtime_dir
        self._most = most
        self._starting: set[str] = set()
        self._started: dict[str, StartedVmm] = {}

    def drivers(self, guest_id: str) -> list[str]:
        """Return the kinds of VMM that can be started for a guest."""
        return sorted({template.driver for template in self._templates if template.fits(guest_id)})

    async def start(self, guest_id: str, driver: str) -> StartedVmm | None:
        """Start a VMM that waits for the guest, and register it; None where one is registered, or no template fits.

        The caller either has `attend` called, or `discard`. FerryError: VMM_FAILED, VMM_UNREACHABLE, GUEST_BUSY,
        GUEST_EXISTS, TOO_MANY_MIGRATIONS.
        """
        fitting = (one for one in self._templates if one.driver == driver and one.fits(guest_id))
        template = next(fitting, None)
        if template is None or self._guests.knows(guest_id):
            return None
        if guest_id in self._starting:
            raise FerryError(Reason.GUEST_BUSY, f"a VMM is being started for guest {guest_id} already: wait for it")
        waiting = len(self._starting) + sum(not vmm.kept for vmm in self._started.values())
        if waiting >= self._most:
            raise FerryError(
                Reason.TOO_MANY_MIGRATIONS, f"{waiting} VMMs wait for their guests, which is the limit: try again later"
            )
        self._starting.add(guest_id)
        try:
            vmm = await self._start(template, guest_id)
        finally:
            self._starting.discard(guest_id)
        self._started[guest_id] = vmm
        return vmm

    async def _start(self, template: Template, guest_id: str) -> StartedVmm:
        await self._until_the_last_is_gone(guest_id)
        path = self._path(guest_id, ".sock")
        if not await asyncio.to_thread(_is_free, path):
            raise FerryError(
                Reason.GUEST_EXISTS,
                f"a VMM that nobody registered serves {path}: register it for guest {guest_id}, or end it",
            )
        process = await Launched.start(template.arguments(guest_id, str(path)), self._path(guest_id, ".log"))
        _log.info("vmm_started", guest=guest_id, driver=template.driver, pid=process.pid, socket=str(path))
        try:
            await self._until_it_waits(template, guest_id, process)
        except BaseException:
            await _end(process)
            process.close()
            await asyncio.to_thread(_is_free, path)
            raise
        return StartedVmm(self._guests.get(guest_id), process)

    async def _until_the_last_is_gone(self, guest_id: str) -> None:
        """Wait for the end of a VMM that was started for the guest before, and that it has left."""
        last = self._started.get(guest_id)
        if last is None or last.attending is None:
            return
        await asyncio.wait([last.attending], timeout=_END_SECONDS)
        if guest_id in self._started:
            raise FerryError(
                Reason.GUEST_EXISTS,
                f"process {last.process.pid}, which was started for guest {guest_id} before, still runs: end it first",
            )

    async def _until_it_waits(self, template: Template, guest_id: str, process: Launched) -> None:
        """Register the guest as soon as its VMM answers. FerryError where it does not, or does not wait."""
        what = f"the VMM that was started for guest {guest_id} ({template.command[0]}, process {process.pid})"
        trouble = "its socket was not looked at"
        delay = _FIRST_LOOK_SECONDS
        try:
            async with asyncio.timeout(template.start_timeout):
                while not process.status:
                    try:
                        found = await self._guests.register(
                            guest_id, template.driver, str(self._path(guest_id, ".sock"))
                        )
                    except FerryError as error:
                        if error.reason not in _NOT_YET:
                            raise
                        trouble = error.message
                    else:
                        await self._refuse_unless_incoming(found, what)
                        return
                    # A program that has ended well may have had the VMM started by another one.
                    await (process.wait(delay) if process.status is None else asyncio.sleep(delay))
                    delay = min(2 * delay, _LONGEST_LOOK_SECONDS)
        except TimeoutError:
            raise FerryError(
                Reason.VMM_UNREACHABLE,
                f"{what} has not answered within {template.start_timeout:g} s: {trouble}; {_said(process)}",
            ) from None
        raise FerryError(
            Reason.VMM_FAILED, f"{what} ended with status {process.status} before it answered; {_said(process)}"
        )

    async def _refuse_unless_incoming(self, found: migration_pb2.Guest, what: str) -> None:
        if found.state == migration_pb2.GUEST_STATE_INCOMING:
            return
        await self._kill(self._guests.get(found.guest_id), "")
        raise FerryError(
            Reason.VMM_FAILED,
            f"{what} does not wait for a guest, as it has to, and was killed: have the template's command start it in "
            "incoming mode",
        )

    # Once it is started

    def attend(self, vmm: StartedVmm, record: MigrationRecord) -> None:
        """Watch over a VMM from now on: it ends with the migration, unless that is committed."""
        vmm.record = record
        vmm.attending = asyncio.create_task(self._attend(vmm, record))

    def keep(self, migration_id: str) -> None:
        """A guest is about to run: its VMM is no longer this starter's to end."""
        for vmm in self._started.values():
            if vmm.record is not None and vmm.record.migration_id == migration_id:
                vmm.kept = True

    async def discard(self, vmm: StartedVmm) -> None:
        """End a VMM that no migration has."""
        if self._holds(vmm, None):
            await self._kill(vmm.guest, vmm.record.migration_id if vmm.record is not None else "")
        await _end(vmm.process)
        await self._see_off(vmm)

    async def close(self) -> None:
        """End those whose migrations have ended, and let the others go: they run on without this sidecar."""
        attending = {vmm.attending: vmm for vmm in self._started.values() if vmm.attending is not None}
        ending = [task for task, vmm in attending.items() if not vmm.kept and vmm.record and vmm.record.state.final]
        if ending:
            await asyncio.wait(ending, timeout=_END_SECONDS)
        for task in attending:
            task.cancel()
        await asyncio.gather(*attending, return_exceptions=True)
        for vmm in list(self._started.values()):
            vmm.process.close()
        self._started.clear()

    async def _attend(self, vmm: StartedVmm, record: MigrationRecord) -> None:
        while not vmm.kept and not record.state.final:
            await record.changes.wait(_TRIM_SECONDS)
            vmm.process.trim()
        if not vmm.kept:
            await self._until_let_go(vmm, record)
            # Free for a moment, it may wait for the next migration by now: then it is that one's.
            if not self._guests.has(vmm.guest) or vmm.guest.migration_id in (None, record.migration_id):
                await self.discard(vmm)
                return
            vmm.kept = True
        while not await vmm.process.wait(_TRIM_SECONDS):
            vmm.process.trim()
        await self._see_off(vmm)

    async def _until_let_go(self, vmm: StartedVmm, record: MigrationRecord) -> None:
        """Wait until the ended migration has done with the VMM, which it may be about to kill itself."""
        try:
            async with asyncio.timeout(_CLEAN_UP_SECONDS):
                while self._holds(vmm, record.migration_id):  # noqa: ASYNC110 - a guest tells nobody that it is free
                    await asyncio.sleep(_FIRST_LOOK_SECONDS)
        except TimeoutError:
            _log.warning("vmm_not_let_go", guest=vmm.guest.guest_id, migration=record.migration_id)

    def _holds(self, vmm: StartedVmm, migration_id: str | None) -> bool:
        return self._guests.has(vmm.guest) and vmm.guest.migration_id == migration_id

    async def _see_off(self, vmm: StartedVmm) -> None:
        """The process has ended: forget the guest too, unless something else serves its socket."""
        guest = vmm.guest
        _log.info("vmm_ended", guest=guest.guest_id, pid=vmm.process.pid, status=vmm.process.status)
        vmm.process.close()
        if await asyncio.to_thread(_is_free, self._path(guest.guest_id, ".sock")) and self._holds(vmm, None):
            await self._guests.forget(guest)
        if self._started.get(guest.guest_id) is vmm:
            del self._started[guest.guest_id]

    async def _kill(self, guest: Guest, holder: str) -> None:
        """End a VMM by its own API, and forget it; no migration but `holder` has it meanwhile."""
        guest.migration_id = holder
        try:
            await guest.driver.kill()
        except FerryError as error:
            _log.warning("vmm_not_killed", guest=guest.guest_id, detail=error.message)
        await self._guests.forget(guest)

    def _path(self, guest_id: str, suffix: str) -> Path:
        """Return the same file for a guest every time. An id too long for a socket's path is told by its hash."""
        path = self._runtime_dir / f"vmm-{guest_id}{suffix}"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            path = self._runtime_dir / f"vmm-{hashlib.sha256(guest_id.encode()).hexdigest()[:32]}{suffix}"
        return path


async def _end(process: Launched) -> None:
    trouble = "it was sent SIGKILL, and has not ended yet"
    try:
        process.kill()
    except OSError as error:
        # It is another user's by now.
        trouble = f"it cannot be killed: {error.strerror}"
    if not await process.wait(_END_SECONDS):
        _log.warning("vmm_not_ended", pid=process.pid, detail=trouble)


def _said(process: Launched) -> str:
    tail = process.tail()
    return f"it said last: {tail}" if tail else "it said nothing"


def _is_free(path: Path) -> bool:
    """Say whether nobody listens at a path; a socket that was left there is removed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return True
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return True
        except OSError:
            # Somebody who takes no connection now.
            return False
    return False
