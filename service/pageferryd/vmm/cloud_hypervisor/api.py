"""Cloud Hypervisor's API: HTTP on a Unix socket (vmm/src/api/openapi/cloud-hypervisor.yaml there)."""

from __future__ import annotations

from typing import Any

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.http_api import RefusedError, UnixHttp

_PAUSE_SECONDS = 60.0
_SHUTDOWN_SECONDS = 2.0
_MIGRATION_SECONDS = 7 * 24 * 3600.0
"""Some versions answer when the migration has ended, others when it has begun."""
_NOT_FOUND = 404
_NO_VM = ("not created", "notcreated")


class CloudHypervisorApi:
    """The calls that a migration needs. Each raises FerryError: VMM_UNREACHABLE, or VMM_FAILED (RefusedError)."""

    def __init__(self, path: str) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the path can be that of a socket."""
        self._http = UnixHttp(path)
        self.path = self._http.path

    async def info(self) -> dict[str, Any] | None:
        """Return what the VMM tells of its VM; None where it has none."""
        try:
            answer = await self._http.call("GET", "/api/v1/vm.info")
        except RefusedError as error:
            text = error.message.lower()
            if error.status == _NOT_FOUND or any(word in text for word in _NO_VM):
                return None
            raise
        if not isinstance(answer, dict):
            raise FerryError(Reason.VMM_FAILED, f"the VMM at {self.path} describes its VM as {type(answer).__name__}")
        return answer

    async def pause(self) -> None:
        """Stop the vCPUs. Refused where they stand still already."""
        await self._http.call("PUT", "/api/v1/vm.pause", seconds=_PAUSE_SECONDS)

    async def resume(self) -> None:
        """Let the vCPUs run. Refused where they run, or a migration has the VM."""
        await self._http.call("PUT", "/api/v1/vm.resume", seconds=_PAUSE_SECONDS)

    async def shutdown(self) -> None:
        """End the VMM."""
        await self._http.call("PUT", "/api/v1/vmm.shutdown", seconds=_SHUTDOWN_SECONDS)

    async def send_migration(self, url: str) -> None:
        """Have the VM sent to the peer at `url`, its memory as memfds."""
        body = {"destination_url": url, "local": True}
        await self._http.call("PUT", "/api/v1/vm.send-migration", body, _MIGRATION_SECONDS)

    async def receive_migration(self, url: str) -> None:
        """Have the VMM listen at `url` for a VM whose pages it asks for. It answers nothing else until the end."""
        # In JSON the mode has a capital; it has none on the command line of ch-remote.
        body = {"receiver_url": url, "memory_mode": "Postcopy"}
        await self._http.call("PUT", "/api/v1/vm.receive-migration", body, _MIGRATION_SECONDS)
