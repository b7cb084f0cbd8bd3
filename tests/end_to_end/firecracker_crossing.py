"""Stand-ins for Firecracker, of any user and in jails, between two sidecars."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, UnixConnector
from child import DEADLINE, Child
from crossing import Crossing, Stage
from moving_guest import Guest
from sidecar_process import Sidecar

from firecracker_vmm.launch import COMMAND, environment
from pageferry.v1 import migration_pb2 as pb

NOBODY = 65534


class Firecracker(Guest):
    """A stand-in: with a guest of `boot` MiB, or waiting for one; as user `user`, or in a jail of that user's."""

    def __init__(self, api: Path, *options: str, boot: int = 0, user: int = 0, jail: Path | None = None) -> None:
        self.socket_path = str(api)
        inside = f"/{api.relative_to(jail)}" if jail is not None else str(api)
        command = [*COMMAND, "--api-sock", inside, *options]
        if boot:
            command += ["--boot", str(boot)]
        popen: dict[str, Any] = {"env": environment()}
        device = -1
        if jail is not None:
            command += ["--jail", str(jail)]
        if user:
            # The jailer gives its user a device of its own.
            device = os.open("/dev/userfaultfd", os.O_RDWR)
            os.set_inheritable(device, True)
            command += ["--uid", str(user), "--device", str(device)]
            popen["pass_fds"] = (device,)
        try:
            Child.__init__(self, command, "stdout", **popen)
        finally:
            if device >= 0:
                os.close(device)
        try:
            self.wait_event("ready")
        except BaseException:
            self.close()
            raise

    async def call(self, method: str, path: str, body: object) -> int:
        """Call its API as an operator does; return the status."""
        connector = UnixConnector(self.socket_path)
        async with (
            asyncio.timeout(DEADLINE),
            ClientSession(connector=connector) as session,
            session.request(method, f"http://localhost{path}", json=body) as answer,
        ):
            await answer.read()
            return answer.status

    async def gives_back(self, mib: int) -> None:
        """Have its balloon take so many MiB from the guest."""
        assert await self.call("PATCH", "/balloon", {"amount_mib": mib}) == 204


class Hosts:
    """A guest at one sidecar, and a Firecracker that waits for it at another."""

    def __init__(self, stage: Stage, source: Sidecar, destination: Sidecar) -> None:
        self._stage = stage
        self.source = source
        self.destination = destination
        self.guest_id = f"microvm-{uuid.uuid4().hex[:8]}"

    async def vmm(self, *options: str, **keywords: Any) -> Firecracker:
        """Start one; options with `api` where its socket is to be."""
        api = keywords.pop("api", None) or self._stage.directory / f"{uuid.uuid4().hex[:8]}.api"
        made: Firecracker = await self._stage._made(lambda: Firecracker(api, *options, **keywords))
        return made

    async def register(self, host: Sidecar, vmm: Firecracker) -> pb.Guest:
        client = await self._stage.client(host)
        return await self._stage.registered(client, self.guest_id, vmm.socket_path, "firecracker")

    async def crossing(self, guest: Firecracker, waiting: Firecracker) -> Crossing:
        """Register both."""
        await self.register(self.source, guest)
        await self.register(self.destination, waiting)
        clients = await self._stage.client(self.source), await self._stage.client(self.destination)
        return Crossing(self.guest_id, self.source, self.destination, *clients, guest, waiting)

    async def usual(self, *options: str, behave: str = "", source: tuple[str, ...] = (), boot: int = 32) -> Crossing:
        """Return a crossing of a small guest; `options` for both, `behave` for the one that waits."""
        guest, waiting = await asyncio.gather(
            self.vmm(*options, *source, boot=boot), self.vmm(*options, *(["--behave", behave] if behave else []))
        )
        return await self.crossing(guest, waiting)


def left_in(*sidecars: Sidecar) -> list[Path]:
    """What migrations left in the directories of sidecars, which keep their journals there."""
    return [path for one in sidecars for path in one.left_behind]


def home_of_nobody(parent: Path, name: str) -> Path:
    home = parent / name
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return home


def jail_of_nobody(parent: Path, name: str) -> Path:
    """A root directory as the jailer of Firecracker makes it: /run is the user's."""
    jail = parent / name
    jail.mkdir()
    home_of_nobody(jail, "run")
    return jail
