"""The two sidecars of the demonstration: processes of their own, as on two hosts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pageferry.client import SidecarClient
from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pageferry.demo.scene import Child, Scene

MODULE = "pageferryd.sidecar"
"""Started, never imported: the client needs no sidecar's code."""
READY_SECONDS: Final = 20.0
DRAIN_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Sidecar:
    """A sidecar that serves: its host's name, its gRPC address, and its HTTP address."""

    name: str
    address: str
    http: str
    child: Child

    def client(self) -> SidecarClient:
        """Return a client of it."""
        return SidecarClient(self.address, None)


async def start_sidecar(scene: Scene, name: str) -> Sidecar:
    """Start the sidecar of host `name` on free ports of loopback, and wait until it serves."""
    home = scene.directory / name
    home.mkdir(mode=0o700)
    # A file of its own, so that one installed on this machine is not read.
    config = home / "pageferryd.toml"
    config.write_text(f"drain_seconds = {DRAIN_SECONDS}\n")
    loopback = "127.0.0.1:0"
    options = ["--insecure", "--host", name, "--listen", loopback, "--http", loopback, "--runtime-dir", str(home)]
    ready: dict[str, Any] = {}

    def hear(line: bytes) -> None:
        if not ready:
            ready.update(_ready(line))

    child = await scene.spawn_python(
        name,
        ["-m", MODULE, "--config", str(config), *options, "--log-format", "json"],
        hear,
        heard="stderr",
        gone=Reason.SIDECAR_UNREACHABLE,
    )
    await child.until(lambda: bool(ready), READY_SECONDS, "the line that says that it serves")
    try:
        return Sidecar(name, str(ready["listen"][0]), str(ready["http"]), child)
    except (KeyError, IndexError, TypeError) as error:
        raise FerryError(
            Reason.PROTOCOL_MISMATCH, f"sidecar {name} says that it is ready, but not where: {ready}"
        ) from error


def _ready(line: bytes) -> dict[str, Any]:
    """Return the fields of the log line that says that a sidecar serves; nothing for any other line."""
    try:
        fields = json.loads(line)
    except ValueError:
        # Something that was printed before the logs were set up.
        return {}
    return fields if isinstance(fields, dict) and fields.get("event") == "ready" else {}
