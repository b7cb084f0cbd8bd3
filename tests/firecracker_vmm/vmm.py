"""The VMM behind the API: which call does what in which state, with Firecracker's answers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from firecracker_vmm import snapshot
from firecracker_vmm.guest import Guest, Kind, memory_for
from firecracker_vmm.handoff import FOREVER, hand_over, open_userfault
from firecracker_vmm.memory import BOOT_MARK, MIB
from pageferry.errors import FerryError
from pageferry.guests.control import GuestStatus, Verification

BEFORE = "The requested operation is not supported before starting the microVM."
AFTER = "The requested operation is not supported after starting the microVM."


class Fault(Exception):
    """An answer with status 400."""


class Vmm:
    """One Firecracker; it misbehaves as `behave` says."""

    def __init__(self, name: str, release: str, behave: str = "", device: int = -1) -> None:
        self._name = name
        self._release = release
        self.behave = behave
        self._device = device
        self._kind = Kind(128 * MIB)
        self._guest: Guest | None = None
        self._state = "Not started"
        self._tracks = False
        self._extra: dict[str, Any] = {}
        self._handed: list[Any] = []
        self.failed = False

    def boot(self, kind: Kind, *, tracks: bool, extra: dict[str, Any]) -> None:
        self._kind, self._tracks, self._extra = kind, tracks, extra
        self._guest = Guest.booted(kind)
        self._state = "Running"

    # What the API asks

    async def answer(self, method: str, path: str, body: Any) -> Any:
        """Return what goes back as JSON, None for nothing; Fault for a refusal."""
        match method, path:
            case "GET", "/":
                return self._instance()
            case "GET", "/version":
                return {"firecracker_version": self._release}
            case "GET", "/machine-config":
                return self._machine()
            case "GET", "/vm/config":
                return {"machine-config": self._machine(), "drives": [], **self._extra}
            case "PATCH", "/vm":
                return await self._patch_vm(body["state"])
            case "PUT", "/snapshot/create":
                return await self._create(body)
            case "PUT", "/snapshot/load":
                return await self._load(body)
            case "PATCH", "/balloon":
                await self._running().inflate(int(body["amount_mib"]))
                return None
        raise Fault(f"Invalid request method and/or path: {method} {path.removeprefix('/')}.")

    def _instance(self) -> dict[str, Any]:
        if self.behave == "instance-odd":
            return {"state": "Dreaming", "vmm_version": self._release}
        return {"id": self._name, "state": self._state, "vmm_version": self._release, "app_name": "Firecracker"}

    def _machine(self) -> dict[str, Any]:
        size = self._guest.memory.size if self._guest is not None else self._kind.size
        return {
            "vcpu_count": 1,
            "mem_size_mib": (size + (MIB if self.behave == "size-lies" else 0)) // MIB,
            "smt": False,
            "cpu_template": "None",
            "track_dirty_pages": self._tracks,
            "huge_pages": "2M" if self._kind.page_size > 4096 else "None",  # noqa: PLR2004
        }

    def _running(self) -> Guest:
        if self._guest is None:
            raise Fault(BEFORE)
        return self._guest

    async def _misbehave(self, step: str) -> None:
        match self.behave.removeprefix(f"{step}-"):
            case "refuses":
                raise Fault(f"This is a bad day to {step}.")
            case "dies":
                os._exit(1)
            case "silent":
                await asyncio.sleep(FOREVER)

    async def _patch_vm(self, wanted: str) -> None:
        guest = self._running()
        if wanted == "Paused":
            await self._misbehave("pause")
            await guest.pause()
            self._state = "Paused"
        else:
            await self._misbehave("resume")
            guest.resume()
            self._state = "Running"

    async def _create(self, body: dict[str, str]) -> None:
        guest = self._running()
        if self._state != "Paused":
            raise Fault("Create snapshot error: Cannot save the microVM state: Operation not allowed: not paused")
        await self._misbehave("create")
        path, memory_path = body["snapshot_path"], body["mem_file_path"]
        try:
            if self.behave == "memory-first":
                await asyncio.to_thread(snapshot.write_memory, memory_path, guest.memory)
            self._write_state(path, snapshot.framed(guest.state()), memory_path)
            await asyncio.to_thread(snapshot.write_memory, memory_path, guest.memory)
        except snapshot.SnapshotError as error:
            raise Fault(f"Create snapshot error: {error}") from error

    def _write_state(self, path: str, content: bytes, memory_path: str) -> None:
        match self.behave:
            case "state-none":
                return
            case "state-torn" if not Path(memory_path).parent.exists():
                content = content[:-3]
            case "state-huge":
                content = b"x"
            case "state-link":
                os.symlink("/etc/hostname", path)  # noqa: PTH211
                return
        snapshot.write_state(path, content)
        if self.behave == "state-huge":
            os.truncate(path, (64 << 20) + 1)

    async def _load(self, body: dict[str, Any]) -> None:
        if self._state != "Not started":
            raise Fault(AFTER)
        try:
            await self._misbehave("load")
            self._guest = await asyncio.to_thread(self._restore, body["snapshot_path"], body["mem_backend"])
        except (snapshot.SnapshotError, FerryError, OSError) as error:
            self.failed = True
            raise Fault(f"Load snapshot error: Failed to restore from snapshot: {error}") from error
        self._state = "Running" if body.get("resume_vm") else "Paused"

    def _restore(self, path: str, backend: dict[str, str]) -> Guest:
        assert backend["backend_type"] == "Uffd", backend
        state = snapshot.read_state(path)
        memory = memory_for(state)
        uffd = open_userfault(memory, self._device)
        # Both stay open, as in Firecracker.
        self._handed = [uffd, hand_over(backend["backend_path"], memory, uffd, self.behave)]
        # Devices look at their queues.
        found = memory.read(BOOT_MARK[0], len(BOOT_MARK[1]))
        if found != BOOT_MARK[1]:
            raise snapshot.SnapshotError(f"Cannot restore devices: {found!r}")
        return Guest.restored(state, memory)

    # What the test asks

    def status(self) -> GuestStatus:
        word = {"Not started": "incoming"}.get(self._state, self._state.lower())
        return self._guest.status(word) if self._guest is not None else GuestStatus(0, 0, word)

    async def verify(self) -> Verification:
        return await self._running().verify()

    def take_findings(self) -> list[str]:
        return self._guest.take_findings() if self._guest is not None else []
