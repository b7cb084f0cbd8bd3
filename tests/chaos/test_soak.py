"""A guest goes back and forth between two sidecars that are never started again, and leaves nothing behind in them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos_cells import LONG
from crossing import COMPLETED, Crossing, Stage
from moving_guest import Guest
from sidecar_process import Sidecar
from trial import eventually

MIGRATIONS = 200 if LONG else 10
WARM_UP = 10 if LONG else 4
MOST_GROWTH = 10 << 20
"""Bytes that a sidecar's resident memory may grow by: for records of what has ended, and as its allocator likes."""
POOLED_THREADS = 8
"""Threads that pools of asyncio and gRPC may start late: not one for each migration."""

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd, pytest.mark.timeout(600 if LONG else 120)]


@dataclass(frozen=True)
class Figures:
    """What a process has: descriptors, bytes of resident memory, threads."""

    fds: int
    resident: int
    threads: int

    @classmethod
    def of(cls, sidecar: Sidecar) -> Figures:
        lines = Path(f"/proc/{sidecar.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return cls(sidecar.fds.total(), int(status["VmRSS"].split()[0]) << 10, int(status["Threads"]))

    def __str__(self) -> str:
        return f"{self.fds} descriptors, {self.resident / (1 << 20):.1f} MiB, {self.threads} threads"


@pytest.fixture
async def stage(short_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        made = Stage(short_path, stack)
        yield made
        await made.leave()


async def there(stage: Stage, guest_id: str, guest: Guest, hosts: list[Sidecar], number: int) -> Guest:
    """Move the guest from the first host to the second, which then is the first; return it."""
    waiting = await stage.guest(f"{guest_id}-{number}", "--incoming", memory="8M")
    clients = [await stage.client(host) for host in hosts]
    await clients[1].register_guest(guest_id, waiting.socket_path)
    crossing = Crossing(guest_id, *hosts, *clients, guest, waiting)
    await crossing.start()
    await crossing.both_become(COMPLETED)
    await guest.exit_code()
    guest.close()
    hosts.reverse()
    return waiting


async def same_again(sidecar: Sidecar, before: Figures) -> Figures:
    """Return the figures once nothing is open that was not open before, or as they are if that does not come."""

    async def look() -> bool:
        now = Figures.of(sidecar)
        return now.fds <= before.fds and now.threads <= before.threads + POOLED_THREADS

    await eventually(look, 5.0)
    return Figures.of(sidecar)


async def test_many_migrations_leave_nothing_behind(stage: Stage, tables: list[str]) -> None:
    hosts = [await stage.sidecar("here"), await stage.sidecar("yonder")]
    both = list(hosts)
    guest_id = f"soak-{uuid.uuid4().hex[:6]}"
    guest = await stage.guest(f"{guest_id}-first", memory="8M")
    await (await stage.client(hosts[0])).register_guest(guest_id, guest.socket_path)
    for number in range(WARM_UP):
        guest = await there(stage, guest_id, guest, hosts, number)
    before = [Figures.of(host) for host in both]
    for number in range(WARM_UP, WARM_UP + MIGRATIONS):
        guest = await there(stage, guest_id, guest, hosts, number)
    await guest.runs_on()
    await guest.is_intact()
    after = [await same_again(host, was) for host, was in zip(both, before, strict=True)]
    tables.append(
        "\n".join(
            f"soak, {host.name}: {was} before, {now} after {MIGRATIONS} migrations"
            for host, was, now in zip(both, before, after, strict=True)
        )
    )
    for was, now in zip(before, after, strict=True):
        assert now.fds <= was.fds, (was, now)
        assert now.threads <= was.threads + POOLED_THREADS, (was, now)
        assert now.resident - was.resident < MOST_GROWTH, (was, now)
        assert all(list(host.runtime_dir.iterdir()) == [] for host in both)
