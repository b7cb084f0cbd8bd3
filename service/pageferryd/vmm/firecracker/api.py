"""Firecracker's API, as far as a migration needs it: src/firecracker/swagger/firecracker.yaml there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.driver import Activity
from pageferryd.vmm.http_api import UnixHttp

if TYPE_CHECKING:
    from typing import Final

STATE_SECONDS: Final = 60.0
"""How long stopping a guest, writing its state and loading it may take."""
_PAGE_SIZES: Final = {"None": 4096, "2M": 2 << 20}
_MAX_MIB: Final = 1 << 24
_ACTIVITIES: Final = {"Not started": Activity.INCOMING, "Running": Activity.RUNNING, "Paused": Activity.PAUSED}


@dataclass(frozen=True)
class Instance:
    """What a Firecracker is doing, and its release as (major, minor)."""

    activity: Activity
    release: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The memory of a microVM: sizes in bytes, and whether Firecracker notes what the guest writes."""

    memory_bytes: int
    page_size: int
    tracks_dirty_pages: bool


class FirecrackerApi:
    """One Firecracker. Every call may raise FerryError: VMM_UNREACHABLE, VMM_FAILED."""

    def __init__(self, path: str) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the path is absolute and fits a socket address."""
        self._http = UnixHttp(path)
        self.path = self._http.path

    async def instance(self) -> Instance:
        """Ask what it is, and what it is doing."""
        told = self._object(await self._http.call("GET", "/"), "/")
        activity = _ACTIVITIES.get(str(told.get("state")))
        release = re.match(r"v?(\d{1,6})\.(\d{1,6})\b", str(told.get("vmm_version")))
        if activity is None or release is None:
            self._odd("/", told)
        return Instance(activity, (int(release[1]), int(release[2])))

    async def machine(self) -> Machine:
        """Ask for the memory's size and kind. FerryError(LAYOUT_INVALID) for a kind that is not known."""
        told = self._object(await self._http.call("GET", "/machine-config"), "/machine-config")
        mib, huge = told.get("mem_size_mib"), told.get("huge_pages") or "None"
        if not isinstance(mib, int) or isinstance(mib, bool) or not 0 < mib <= _MAX_MIB:
            self._odd("/machine-config", told)
        page_size = _PAGE_SIZES.get(str(huge))
        if page_size is None:
            raise FerryError(Reason.LAYOUT_INVALID, f"the VMM at {self.path} has memory of an unknown kind: {huge!r}")
        return Machine(mib << 20, page_size, told.get("track_dirty_pages") is True)

    async def obstacles(self) -> list[str]:
        """Tell which of the microVM's devices keep it from being moved, a sentence each."""
        told = self._object(await self._http.call("GET", "/vm/config"), "/vm/config")
        drives = told.get("drives")
        found = [
            f"its drive {drive.get('drive_id')!r} is vhost-user, which Firecracker cannot snapshot"
            for drive in (drives if isinstance(drives, list) else [])
            if isinstance(drive, dict) and drive.get("socket")
        ]
        if told.get("memory-hotplug"):
            found.append("it has hotpluggable memory (virtio-mem), which is not supported")
        return found

    async def pause(self) -> None:
        """Stop the vCPUs."""
        await self._http.call("PATCH", "/vm", {"state": "Paused"}, STATE_SECONDS)

    async def resume(self) -> None:
        """Let the vCPUs run."""
        await self._http.call("PATCH", "/vm", {"state": "Resumed"}, STATE_SECONDS)

    async def create_snapshot(self, state_path: str, memory_path: str, kind: str) -> None:
        """Have state and memory of the stopped microVM written; `kind` is "Full" or "Diff"."""
        body = {"snapshot_path": state_path, "mem_file_path": memory_path, "snapshot_type": kind}
        await self._http.call("PUT", "/snapshot/create", body, STATE_SECONDS)

    async def load_snapshot(self, state_path: str, pager_path: str) -> None:
        """Have a state loaded, with memory whose faults go to the pager that listens at `pager_path`."""
        body = {
            "snapshot_path": state_path,
            "mem_backend": {"backend_type": "Uffd", "backend_path": pager_path},
            "resume_vm": False,
        }
        await self._http.call("PUT", "/snapshot/load", body, STATE_SECONDS)

    def _object(self, told: Any, path: str) -> dict[str, Any]:
        if not isinstance(told, dict):
            self._odd(path, told)
        return told

    def _odd(self, path: str, told: object) -> NoReturn:
        raise FerryError(
            Reason.VMM_FAILED, f"the VMM at {self.path} answers GET {path} as no Firecracker does: {str(told)[:200]}"
        )
