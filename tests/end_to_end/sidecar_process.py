"""A sidecar as a process of its own: its settings, its API, its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from child import DEADLINE, Child, private_environment
from prometheus_client.parser import text_string_to_metric_families

from pageferry.client import SidecarClient
from pageferry.tls import TlsFiles

COMMAND = (sys.executable, "-m", "pageferryd.sidecar")
# So small that a test can wait for them.
QUICK_LIMITS = {"prepare_timeout": 6.0, "handover_timeout": 6.0, "reconnect_max_seconds": 0.4}


def free_port() -> int:
    """Return a port that nobody has, outside of those that the kernel gives out by itself (32768 and above)."""
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port in a hundred tries")


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """Write settings as TOML: plain values first, then the tables."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


class Sidecar(Child):
    """One sidecar that is ready. Insecure on loopback unless `tls` is given; `prefix` is a command to run it under."""

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        tls: TlsFiles | None = None,
        limits: dict[str, Any] | None = None,
        prefix: tuple[str, ...] = (),
        more_arguments: tuple[str, ...] = (),
        **settings: Any,
    ) -> None:
        self.name = name
        self.tls = tls
        self.runtime_dir = Path(settings.pop("runtime_dir", directory / f"{name}-run"))
        values = {
            "host": name,
            "listen": ["127.0.0.1:0"],
            "http": "127.0.0.1:0",
            "runtime_dir": str(self.runtime_dir),
            "log_level": "info",
            **settings,
            "limits": {**QUICK_LIMITS, **(limits or {})},
        }
        if tls is None:
            values["insecure"] = True
        else:
            values["tls"] = {"ca": str(tls.ca), "certificate": str(tls.certificate), "key": str(tls.key)}
        config = write_config(directory / f"{name}.toml", values)
        super().__init__(
            [*prefix, *COMMAND, "--config", str(config), *more_arguments],
            "stderr",
            env=private_environment(),
            cwd=directory,
        )
        try:
            ready = self.wait_event("ready")
        except BaseException:
            self.close()
            raise
        self.address: str = ready["listen"][0]
        self.http: str = ready["http"]
        self.lanes: str = ready["lanes"]
        """Where it serves pages over bare sockets; empty where it does not."""

    def client(self, tls: TlsFiles | None = None) -> SidecarClient:
        """Return a client, to be entered; as an operator with `tls`, or as the sidecar's own host."""
        return SidecarClient(self.address, tls or self.tls, self.name if self.tls else None, timeout=DEADLINE)

    @property
    def left_behind(self) -> list[Path]:
        """What it has in its runtime directory, beside notes of migrations that ended with a guest to be decided on."""
        notes = self.runtime_dir / "journal.d"
        may_stay = (".never", ".lost", ".given", ".leaving")
        found = [path for path in self.runtime_dir.iterdir() if path != notes]
        return found + [path for path in notes.glob("*") if path.suffix not in may_stay]

    async def get(self, path: str) -> tuple[int, str]:
        """Return status and body of an HTTP GET."""
        return await asyncio.to_thread(self._get, path)

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=DEADLINE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    async def metrics(self) -> Metrics:
        status, text = await self.get("/metrics")
        assert status == 200
        return Metrics(text)

    async def terminate(self) -> int:
        """End it as a service manager does; return its exit code."""
        self.signal(signal.SIGTERM)
        return await self.exit_code()


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of that name with these labels; there must be one."""
        values = [
            sample.value
            for sample in self._samples
            if sample.name == f"pageferry_{name}" and labels.items() <= sample.labels.items()
        ]
        assert values, f"no pageferry_{name} with {labels}"
        return sum(values)


def run_to_its_end(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a sidecar that is expected to end by itself."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=private_environment(), capture_output=True, text=True, timeout=DEADLINE
    )
