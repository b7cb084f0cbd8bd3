"""Stock QEMUs: a real Linux guest crosses while it works, and nothing of it is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from crossing import PAUSED, POSTCOPY, Stage
from qemu_crossing import BACKENDS, SMALL, QemuHosts, traces_in, works
from sidecar_process import Sidecar
from tcp_proxy import TcpProxy

from pageferry.v1 import migration_pb2 as pb
from qemu_guest.image import what_is_missing

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.root,
    pytest.mark.userfaultfd,
    pytest.mark.qemu,
    pytest.mark.timeout(180),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.fixture
async def hosts(stage: Stage) -> AsyncIterator[QemuHosts]:
    async with AsyncExitStack() as stack:
        yield QemuHosts(stage, stack)


@pytest.mark.parametrize(("backend", "vcpus"), list(zip(BACKENDS, (1, 2, 1, 2), strict=True)))
async def test_a_working_guest_crosses_whatever_its_ram_is_in(
    hosts: QemuHosts, alpha: Sidecar, beta: Sidecar, backend: str, vcpus: int
) -> None:
    hosts.machine = replace(SMALL, vcpus=vcpus, vga=True)
    hosts.options = BACKENDS[backend]
    await hosts.start(alpha, beta)
    shown = await hosts.crosses()
    assert shown.progress.faults > 0
    assert shown.progress.pages_present == shown.progress.pages_total
    assert traces_in(hosts.guest) == []


async def test_it_crosses_back_and_then_ten_times_more(hosts: QemuHosts, alpha: Sidecar, beta: Sidecar) -> None:
    await hosts.start(alpha, beta)
    for _ in range(12):
        await hosts.crosses()
    assert traces_in(hosts.guest) == []


async def test_a_lost_connection_costs_the_guest_nothing_but_time(hosts: QemuHosts, stage: Stage) -> None:
    async with TcpProxy() as proxy:
        source = await stage.sidecar("source", advertise=proxy.address, lane_sockets=False)
        destination = await stage.sidecar("destination")
        proxy.target = source.address
        proxy.cut_after = 8 << 20
        await hosts.start(source, destination)
        waiting = await hosts.waits()
        await hosts.begin()
        await hosts.becomes(destination, PAUSED)
        proxy.heal()
        await hosts.arrives(waiting)


async def test_the_guest_works_at_its_destination_long_before_its_memory_is_there(
    hosts: QemuHosts, alpha: Sidecar, beta: Sidecar
) -> None:
    await hosts.start(alpha, beta)
    waiting = await hosts.waits()
    await hosts.begin(push_disabled=True)
    await hosts.becomes(beta, POSTCOPY)
    await waiting.attach()
    await works(waiting)
    shown = await (await hosts.client(alpha)).get_migration(hosts.migration_id)
    assert shown.state == POSTCOPY
    assert 0 < shown.progress.pages_present < shown.progress.pages_total
    await (await hosts.client(alpha)).set_limits(hosts.migration_id, pb.Limits())
    await hosts.arrives(waiting)


async def test_a_destination_sidecar_that_is_killed_is_started_again_and_loses_nothing(
    hosts: QemuHosts, stage: Stage
) -> None:
    """QEMU keeps the userfaultfd: the guest waits, and the next sidecar takes it from there."""
    source, destination = await stage.sidecar("source"), await stage.sidecar("destination")
    await hosts.start(source, destination)
    waiting = await hosts.waits()
    await hosts.begin(push_bytes_per_second=8 << 20)
    await hosts.becomes(source, POSTCOPY)
    destination.process.kill()
    await destination.exit_code()
    again = await stage.sidecar("destination", listen=[destination.address], runtime_dir=str(destination.runtime_dir))
    hosts.hosts[1] = again
    shown = await hosts.arrives(waiting)
    assert shown.progress.pages_present == shown.progress.pages_total
    assert traces_in(hosts.guest) == []
    assert not (again.runtime_dir / "journal.d").exists()
