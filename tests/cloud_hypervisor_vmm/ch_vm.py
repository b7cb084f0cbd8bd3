"""The VM and who has it: nobody, the VMM, or a migration."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
from typing import Any

from ch_faults import FaultHandler
from ch_memory import RamMapping, TwoRegions
from ch_receive import Received, receive
from ch_send import send
from ch_wire import ProtocolError

from pageferry.guests.control import GuestStatus, Verification
from pageferry.guests.process.guest import _check, _fill
from pageferry.guests.process.plan import Plan, Progress, pack_state, unpack_state
from pageferry.guests.process.worker import Worker

MIB = 1 << 20


class VmmError(Exception):
    """What the API answers with 500."""


class Vmm:
    def __init__(self, behave: str = "", answers_late: bool = False) -> None:
        self.behave = behave
        self.answers_late = answers_late
        self.memory: TwoRegions | None = None
        self.worker: Worker | None = None
        self.state = ""
        self.faults: FaultHandler | None = None
        self._shared = True
        self._sending: asyncio.Task[None] | None = None
        self._verifying = asyncio.Lock()

    def boot(self, memory: TwoRegions, plan: Plan, *, shared: bool) -> None:
        _fill(memory, plan)  # type: ignore[arg-type]
        self.memory, self.worker = memory, Worker(memory, plan, Progress())  # type: ignore[arg-type]
        self.worker.let_go("api")
        self.state, self._shared = "Running", shared

    # The API

    def info(self) -> dict[str, Any] | None:
        if self.memory is None or self.worker is None:
            return None
        memory = {
            "size": self.memory.size,
            "mergeable": False,
            "hotplug_method": "Acpi",
            "hotplug_size": None,
            "hotplugged_size": None,
            "shared": self._shared,
            "hugepages": False,
            "hugepage_size": None,
            "prefault": False,
            "zones": None,
            "thp": True,
        }
        return {"config": {"memory": memory}, "state": self.state, "memory_actual_size": self.memory.size}

    async def pause(self) -> None:
        worker = self._owned()
        if self.state != "Running":
            raise VmmError("Error from API: The VM could not be paused: invalid transition from Paused to Paused")
        await worker.hold("api")
        self.state = "Paused"

    async def resume(self) -> None:
        worker = self._owned()
        if self.state != "Paused":
            raise VmmError("Error from API: The VM could not resume: invalid transition from Running to Running")
        worker.let_go("api")
        self.state = "Running"

    async def send_migration(self, url: str, local: bool) -> None:
        self._owned()
        if not local or not url.startswith("unix:"):
            raise VmmError(f"this VMM only migrates locally: {url}")
        if not self._shared:
            raise VmmError("Local migration requires shared memory or hugepages enabled")
        self._sending = asyncio.create_task(self._send(url.removeprefix("unix:")))

    async def sent(self) -> None:
        """Wait until the migration has ended."""
        assert self._sending is not None
        await asyncio.shield(self._sending)

    async def receive_migration(self, url: str, mode: str) -> None:
        """Everything else waits until this has ended, as in the VMM."""
        if self.worker is not None:
            raise VmmError("Can't receive a migration when a VM is already created")
        try:
            await asyncio.to_thread(receive, self, url.removeprefix("unix:"), mode, asyncio.get_running_loop())
        except (ProtocolError, OSError) as error:
            self.memory = self.worker = None
            raise VmmError(f"Migration was aborted: {error}") from error

    def _owned(self) -> Worker:
        if self.worker is None:
            raise VmmError("VM is not created")
        if self._sending is not None and not self._sending.done():
            raise VmmError("Error from API: VM is migrating")
        return self.worker

    # Migrations

    async def _send(self, path: str) -> None:
        initial = self.state
        assert self.memory is not None
        assert self.worker is not None
        if initial == "Running":
            await self.worker.hold("api")
            self.state = "Paused"
        try:
            await asyncio.to_thread(
                send, path, self.memory, self.config(), self.saved_state(), initial == "Running", self.behave
            )
        except (ProtocolError, OSError) as error:
            if initial == "Running":
                self.worker.let_go("api")
                self.state = "Running"
            self._sending = None
            print(f"Migration failed: {error}", file=sys.stderr)
            if self.answers_late:
                raise VmmError(f"Error sending migration: {error}") from error
            return
        # The VM is elsewhere: the VMM ends.
        os._exit(0)

    def config(self) -> dict[str, Any]:
        assert self.memory is not None
        mappings = [one.as_json() for one in self.memory.mappings]
        return {
            "vm_config": {"memory": {"shared": True}},
            "common_cpuid": [],
            "memory_manager_data": {"memory_ranges": {"data": []}, "guest_ram_mappings": mappings},
        }

    def saved_state(self) -> bytes:
        assert self.worker is not None
        packed = pack_state(self.worker.plan, self.worker.progress())
        return json.dumps({"snapshots": {"vcpu": base64.b64encode(packed).decode()}}).encode()

    def configured(self, config: dict[str, Any], files: dict[int, int]) -> TwoRegions:
        """Map the memory files that came."""
        mappings = [
            RamMapping(one["slot"], one["gpa"], one["size"], one["file_offset"])
            for one in config["memory_manager_data"]["guest_ram_mappings"]
        ]
        self.memory = TwoRegions(mappings, files)
        return self.memory

    def serve_faults(self, connection: socket.socket) -> None:
        assert self.memory is not None
        self.faults = FaultHandler(self.memory, connection, self.behave)
        self.faults.start()

    def restored(self, received: Received) -> None:
        """Restore the devices, one of which has a queue in the first page of each region."""
        assert self.memory is not None
        plan, progress = unpack_state(base64.b64decode(json.loads(received.state)["snapshots"]["vcpu"]))
        self.memory.read(0, 16)
        self.memory.read(self.memory.mappings[0].size, 16)
        self.worker = Worker(self.memory, plan, progress)  # type: ignore[arg-type]
        self.state = "Paused"

    def run(self) -> None:
        assert self.worker is not None
        self.worker.let_go("api")
        self.state = "Running"

    # The terminal

    def status(self) -> GuestStatus:
        worker = self.worker
        if worker is None:
            return GuestStatus(0, 0, "incoming")
        return GuestStatus(worker.steps, worker.errors, self.state.lower(), worker.longest_stall_ms())

    async def verify(self) -> Verification:
        assert self.worker is not None
        assert self.memory is not None
        async with self._verifying:
            await self.worker.hold("verifier")
            try:
                return await asyncio.to_thread(_check, self.memory, self.worker.plan, self.worker.steps)  # type: ignore[arg-type]
            finally:
                self.worker.let_go("verifier")

    def take_findings(self) -> list[str]:
        return self.worker.take_findings() if self.worker is not None else []
