"""A real Linux guest in a stock QEMU, on its way between two sidecars."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossing import COMPLETED, FAILED, Stage, until
from sidecar_process import Sidecar

from pageferry.client import SidecarClient, ended
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb
from pageferryd.linux.proc import open_files
from qemu_guest.guest import Backend, Machine, QemuGuest

SMALL = Machine(memory_mib=128)
UFFD_REGISTERED = "um"
"""VmFlags of a mapping that a userfaultfd guards (proc_pid_smaps(5))."""


@dataclass
class QemuHosts:
    """Two sidecars, and one guest that goes from one to the other and back."""

    stage: Stage
    stack: AsyncExitStack
    machine: Machine = SMALL
    options: dict[str, Any] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"web-{uuid.uuid4().hex[:8]}")
    migration_id: str = ""

    async def start(self, *hosts: Sidecar) -> None:
        """Start the guest at the first host, and let it work."""
        self.hosts = list(hosts)
        self.guest = await self.qemu()
        await self.register(self.hosts[0], self.guest)

    async def qemu(self, **options: Any) -> QemuGuest:
        machine = options.pop("machine", self.machine)
        return await self.stack.enter_async_context(QemuGuest(machine, **{**self.options, **options}))

    async def register(self, host: Sidecar, qemu: QemuGuest) -> pb.Guest:
        client = await self.client(host)
        return await self.stage.registered(client, self.name, str(qemu.qmp_path), "qemu")

    async def client(self, host: Sidecar) -> SidecarClient:
        return await self.stage.client(host)

    async def waits(self, **options: Any) -> QemuGuest:
        """Have a QEMU wait for the guest at the second host."""
        waiting = await self.qemu(incoming=True, **options)
        await self.register(self.hosts[1], waiting)
        return waiting

    async def begin(self, **limits: Any) -> None:
        """Start the migration from the first host to the second."""
        client = await self.client(self.hosts[0])
        found = await client.start_migration(
            self.name, self.hosts[1].address, request_id=uuid.uuid4().hex, limits=pb.Limits(**limits)
        )
        self.migration_id = found.migration_id

    async def becomes(self, host: Sidecar, *states: int) -> pb.Migration:
        client = await self.client(host)

        async def look() -> pb.Migration | None:
            try:
                found = await client.get_migration(self.migration_id)
            except FerryError as error:
                if error.reason is Reason.UNKNOWN_MIGRATION:
                    return None
                raise
            if found.state in states:
                return found
            assert not ended(found), f"{pb.MigrationState.Name(found.state)}: {found.error}"
            return None

        found: pb.Migration = await until(look, f"{[pb.MigrationState.Name(state) for state in states]}", 30.0)
        return found

    async def arrives(self, waiting: QemuGuest) -> pb.Migration:
        """Wait until it is over: the guest works on in `waiting`, whole; turn round for the way back."""
        shown = await self.becomes(self.hosts[0], COMPLETED)
        await self.becomes(self.hosts[1], COMPLETED)
        await waiting.attach()
        await works(waiting)
        assert await self.guest.exit_code() == 0
        self.guest = waiting
        self.hosts.reverse()
        return shown

    async def crosses(self, **options: Any) -> pb.Migration:
        waiting = await self.waits(**options)
        await self.begin()
        return await self.arrives(waiting)

    async def fails(self, *reasons: Reason) -> pb.Migration:
        """Wait until it has failed, and the guest works on where it was."""
        shown = await self.becomes(self.hosts[0], FAILED)
        assert Reason(shown.error.reason) in reasons, shown.error
        await works(self.guest)
        return shown


async def works(guest: QemuGuest) -> None:
    """The guest's workload goes on, and every page of it is right."""
    before = await guest.stats()
    verified = await guest.verify()
    assert verified.bad == 0, verified
    assert verified.pages == guest.machine.worked_mib * 256

    async def look() -> bool:
        now = await guest.stats()
        assert now.bad == 0
        return now.writes > before.writes

    await until(look, "the guest works on")


def traces_in(guest: QemuGuest) -> list[str]:
    """Return what an attached pager leaves in a QEMU: userfaultfds, guarded mappings, a tracer."""
    proc = Path(f"/proc/{guest.pid}")
    found = [link for link in open_files(guest.pid).values() if "userfaultfd" in link]
    flags = (line for line in (proc / "smaps").read_text().splitlines() if line.startswith("VmFlags:"))
    found += [line for line in flags if UFFD_REGISTERED in line.split()]
    tracer = (proc / "status").read_text().partition("TracerPid:")[2].split()[0]
    return found if tracer == "0" else [*found, f"traced by {tracer}"]


BACKENDS = {
    "plain": {},
    "preallocated": {"prealloc": True},
    "memfd": {"backend": Backend.MEMFD},
    "preallocated file": {"backend": Backend.FILE, "prealloc": True},
}
