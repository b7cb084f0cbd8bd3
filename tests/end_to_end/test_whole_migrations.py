"""A running guest crosses from one host to another, and nothing of it is lost."""

from __future__ import annotations

import pytest
from crossing import COMPLETED, Crossing, Stage, until
from sidecar_process import Sidecar

from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

CROSSINGS = [
    pytest.param("process", "anonymous", "32M", id="process-anonymous"),
    pytest.param("process", "shmem", "32M", id="process-shmem"),
    pytest.param("kvm", "anonymous", "32M", id="kvm-anonymous", marks=pytest.mark.kvm),
    pytest.param("kvm", "shmem", "32M", id="kvm-shmem", marks=pytest.mark.kvm),
]


@pytest.mark.parametrize(("kind", "backing", "memory"), CROSSINGS)
async def test_a_guest_goes_on_at_the_destination_with_all_its_memory_and_needs_no_sidecar(
    stage: Stage, alpha: Sidecar, beta: Sidecar, kind: str, backing: str, memory: str
) -> None:
    backed = ("--backing", backing)
    crossing = await stage.crossing(alpha, beta, *backed, waiting_options=backed, kind=kind, memory=memory)
    await crossing.guest.runs_on()
    before = await crossing.guest.steps()
    fds = beta.fds

    await crossing.start()
    left, came = await crossing.arrives()

    assert await crossing.waiting.steps() > before
    pages = (32 << 20) // 4096
    for shown in (left, came):
        assert shown.progress.pages_total == pages
        assert shown.progress.pages_present == pages
        assert shown.progress.demand_pages + shown.progress.push_pages == pages
        assert shown.progress.pages_poisoned == shown.progress.faults_waiting == 0
        assert not shown.HasField("error")
        assert shown.postcopy_duration.ToTimedelta().total_seconds() > 0
    assert left.downtime.ToTimedelta().total_seconds() > 0
    assert (left.role, came.role) == (pb.ROLE_SOURCE, pb.ROLE_DESTINATION)
    assert crossing.guest_id not in [guest.guest_id for guest in await crossing.at_source.list_guests()]

    async def nothing_held() -> bool:
        return beta.fds == fds

    print("BEFORE", fds)
    import asyncio; await asyncio.sleep(1); print("AFTER", beta.fds)
    await until(nothing_held, f"the destination holds {fds} again")
    assert list(beta.runtime_dir.iterdir()) == []
    assert "anon_inode:[userfaultfd]" not in crossing.waiting.fds
