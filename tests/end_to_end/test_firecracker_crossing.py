"""Firecracker guests, with a stand-in VMM that keeps to its API and its hand-off, between two sidecars."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from crossing import CANCELLED, COMPLETED, FAILED, POSTCOPY, Crossing, Stage, until
from firecracker_crossing import NOBODY, Firecracker, Hosts, home_of_nobody, jail_of_nobody, left_in
from sidecar_process import Sidecar

from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


@pytest.fixture
async def hosts(stage: Stage, alpha: Sidecar, beta: Sidecar) -> AsyncIterator[Hosts]:
    yield Hosts(stage, alpha, beta)
    await stage.leave()
    assert left_in(alpha, beta) == []


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="current"),
        pytest.param(("--guarded", "--behave", "hand-old-keys"), id="old"),
        pytest.param(("--working-set", "1.0"), id="busy"),
    ],
)
async def test_a_working_guest_crosses_whole(hosts: Hosts, options: tuple[str, ...]) -> None:
    crossing = await hosts.usual(*options)
    await crossing.start()
    _, came = await crossing.arrives()
    assert came.progress.pages_total == 32 * 256


async def test_a_guest_with_memory_on_both_sides_of_the_hole_crosses(hosts: Hosts) -> None:
    crossing = await hosts.usual("--working-set", "0.2", boot=3072 + 16)
    await crossing.start()
    await crossing.arrives()


async def test_what_the_balloon_takes_on_the_way_is_zero_from_then_on(hosts: Hosts) -> None:
    crossing = await hosts.usual("--working-set", "0.2")
    assert crossing.waiting is not None
    await crossing.guest.gives_back(4)
    await crossing.start(push_disabled=True)
    await crossing.becomes(crossing.at_destination, POSTCOPY)
    for mib in (8, 12, 20):
        await crossing.waiting.gives_back(mib)
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    _, came = await crossing.arrives()
    assert came.progress.pages_total == 32 * 256
    # Nobody watches the memory any more: the balloon goes on without anybody.
    await crossing.waiting.gives_back(24)
    await crossing.waiting.runs_on()
    await crossing.waiting.is_intact()


async def test_the_balloon_works_while_everything_comes(hosts: Hosts) -> None:
    crossing = await hosts.usual("--working-set", "0.2", boot=64)
    assert crossing.waiting is not None
    await crossing.start(push_bytes_per_second=64 << 20)
    await crossing.becomes(crossing.at_destination, POSTCOPY, COMPLETED)
    for mib in range(2, 48, 2):
        await crossing.waiting.gives_back(mib)
    await crossing.arrives()


async def test_a_guest_goes_there_and_back(hosts: Hosts, stage: Stage, alpha: Sidecar, beta: Sidecar) -> None:
    crossing = await hosts.usual()
    await crossing.start()
    await crossing.arrives()
    assert isinstance(crossing.waiting, Firecracker)
    back = Hosts(stage, beta, alpha)
    back.guest_id = hosts.guest_id
    waiting = await back.vmm()
    await back.register(alpha, waiting)
    returning = Crossing(
        hosts.guest_id, beta, alpha, crossing.at_destination, crossing.at_source, crossing.waiting, waiting
    )
    await returning.start()
    await returning.arrives()


@pytest.mark.hugetlb
async def test_a_guest_in_huge_pages_crosses(hosts: Hosts, huge_pages: None) -> None:
    crossing = await hosts.usual("--working-set", "0.2", source=("--huge-pages",), boot=4)
    assert crossing.waiting is not None
    await crossing.start(push_disabled=True)
    await crossing.becomes(crossing.at_destination, POSTCOPY)
    # The first huge page comes as it is touched, the second is never needed.
    await crossing.waiting.gives_back(2)
    _, came = await crossing.arrives()
    assert came.progress.pages_discarded == 512


async def test_a_guest_whose_state_comes_with_its_memory_file_crosses_too(hosts: Hosts, alpha: Sidecar) -> None:
    since = len(alpha.events)
    crossing = await hosts.usual(source=("--behave", "memory-first"))
    await crossing.start()
    await crossing.arrives()
    told = await alpha.event("firecracker_state_saved", since)
    assert told["memory_file"] == "Full"


async def test_the_way_of_the_state_is_logged(hosts: Hosts, alpha: Sidecar) -> None:
    since = len(alpha.events)
    crossing = await hosts.usual()
    await crossing.start()
    await crossing.arrives()
    told = await alpha.event("firecracker_state_saved", since)
    assert told["memory_file"] == "none"
    assert told["bytes"] > 0


async def test_releases_that_differ_do_not_take_each_others_guests(hosts: Hosts) -> None:
    guest, waiting = await asyncio.gather(hosts.vmm("--release", "1.15.0", boot=16), hosts.vmm("--release", "1.16.1"))
    crossing = await hosts.crossing(guest, waiting)
    await crossing.start()
    failed = await crossing.fails(Reason.VMM_MISMATCH)
    assert "Firecracker 1.15" in failed.error.message
    assert "Firecracker 1.16" in failed.error.message


# Guests that stay


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        # What its end shows by first: the call that it does not answer, or the process.
        ("hand-then-dies", (Reason.VMM_UNREACHABLE, Reason.VMM_GONE)),
        ("hand-no-fd", Reason.HANDOFF_NO_FD),
        ("hand-not-uffd", Reason.HANDOFF_NO_FD),
        ("hand-sizes", Reason.HANDOFF_REGIONS),
        ("hand-fewer", Reason.HANDOFF_REGIONS),
        ("hand-more", Reason.HANDOFF_REGIONS),
        ("hand-offsets", Reason.HANDOFF_REGIONS),
        ("hand-page-size", Reason.HANDOFF_REGIONS),
        ("hand-huge", Reason.HANDOFF_MALFORMED),
        ("load-refuses", Reason.VMM_FAILED),
        ("load-dies", Reason.VMM_UNREACHABLE),
    ],
)
async def test_a_firecracker_that_does_not_take_it_leaves_the_guest_at_its_source(
    hosts: Hosts, behave: str, reason: Reason | tuple[Reason, ...]
) -> None:
    crossing = await hosts.usual("--working-set", "0.2", behave=behave)
    await crossing.start()
    failed = await crossing.fails(*(reason if isinstance(reason, tuple) else (reason,)))
    assert len(failed.error.message) > 20
    await crossing.guest.is_intact()


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        ("load-silent", Reason.HANDOFF_TIMEOUT),
        ("hand-silent", Reason.HANDOFF_TIMEOUT),
        ("hand-then-silent", Reason.VMM_UNREACHABLE),
    ],
)
async def test_a_firecracker_that_is_silent_does_not_keep_the_guest_for_long(
    stage: Stage, behave: str, reason: Reason
) -> None:
    hasty = await asyncio.gather(
        stage.sidecar("hasty-source", limits={"handover_timeout": 3.0}),
        stage.sidecar("hasty", limits={"prepare_timeout": 1.0, "handover_timeout": 3.0}),
    )
    hosts = Hosts(stage, *hasty)
    crossing = await hosts.usual("--working-set", "0.2", behave=behave)
    await crossing.start()
    await crossing.fails(reason)
    await crossing.guest.is_intact()


@pytest.mark.parametrize("behave", ["pause-refuses", "create-refuses", "state-none", "state-huge", "state-link"])
async def test_a_firecracker_that_does_not_let_it_go_keeps_the_guest(hosts: Hosts, behave: str) -> None:
    crossing = await hosts.usual(source=("--behave", behave))
    await crossing.start()
    await crossing.fails(Reason.VMM_FAILED)
    await crossing.guest.is_intact()


async def test_a_guest_whose_new_firecracker_ends_as_it_is_told_to_run_is_not_run_twice(hosts: Hosts) -> None:
    crossing = await hosts.usual(behave="resume-dies")
    await crossing.start()
    for shown in await crossing.both_become(FAILED):
        assert shown.error.reason == Reason.VMM_GONE
    assert await _stands_still(crossing)


async def test_a_guest_that_could_not_be_resumed_is_told_of(hosts: Hosts) -> None:
    crossing = await hosts.usual(source=("--behave", "resume-refuses"), behave="load-refuses")
    await crossing.start()
    failed = await crossing.becomes(crossing.at_source, FAILED)
    assert "This is a bad day to load." in failed.error.message
    assert "the guest could not be resumed" in failed.error.message
    assert "This is a bad day to resume." in failed.error.message


async def test_a_guest_whose_memory_is_not_found_is_not_moved(hosts: Hosts) -> None:
    guest = await hosts.vmm("--behave", "size-lies", boot=16)
    shown = await hosts.register(hosts.source, guest)
    assert not shown.movable
    assert "found nowhere" in shown.obstacles[0]
    waiting = await hosts.vmm()
    crossing = await hosts.crossing(guest, waiting)
    await crossing.start()
    await crossing.fails(Reason.GUEST_NOT_MOVABLE)


async def test_a_migration_that_is_taken_back_leaves_a_whole_guest(hosts: Hosts) -> None:
    crossing = await hosts.usual(behave="load-silent")
    await crossing.start()
    await until(lambda: _stands_still(crossing), "the guest stands still")
    await crossing.at_source.cancel_migration(crossing.migration_id)
    await crossing.becomes(crossing.at_source, CANCELLED)
    await crossing.runs_at_source()
    await crossing.guest.is_intact()


async def _stands_still(crossing: Crossing) -> bool:
    return bool((await crossing.guest.status())["state"] == "paused")


# Firecrackers of another user


@pytest.fixture
async def own_hosts(stage: Stage) -> Hosts:
    """Sidecars whose directories lie where others may pass."""
    stage.directory.chmod(0o711)
    return Hosts(stage, *await asyncio.gather(stage.sidecar("gamma"), stage.sidecar("delta")))


async def test_firecrackers_of_another_user_pass_a_guest_on(own_hosts: Hosts, stage: Stage) -> None:
    homes = [home_of_nobody(stage.directory, name) for name in ("a", "b")]
    guest, waiting = await asyncio.gather(
        own_hosts.vmm(api=homes[0] / "api", boot=16, user=NOBODY), own_hosts.vmm(api=homes[1] / "api", user=NOBODY)
    )
    crossing = await own_hosts.crossing(guest, waiting)
    await crossing.start()
    await crossing.arrives()
    assert left_in(own_hosts.source, own_hosts.destination) == []


async def test_jailed_firecrackers_pass_a_guest_on(own_hosts: Hosts, stage: Stage) -> None:
    jails = [jail_of_nobody(stage.directory, name) for name in ("a", "b")]
    guest, waiting = await asyncio.gather(
        own_hosts.vmm(api=jails[0] / "run" / "api", boot=16, user=NOBODY, jail=jails[0]),
        own_hosts.vmm(api=jails[1] / "run" / "api", user=NOBODY, jail=jails[1]),
    )
    crossing = await own_hosts.crossing(guest, waiting)
    await crossing.start()
    await crossing.arrives()
    assert [path for jail in jails for path in (jail / "run" / "pageferry").iterdir()] == []


async def test_a_jail_that_leads_out_of_itself_gets_nothing(own_hosts: Hosts, stage: Stage) -> None:
    jails = [jail_of_nobody(stage.directory, name) for name in ("a", "b")]
    outside = home_of_nobody(stage.directory, "outside")
    (jails[1] / "run" / "pageferry").symlink_to("../../outside")
    guest, waiting = await asyncio.gather(
        own_hosts.vmm(api=jails[0] / "run" / "api", boot=16, user=NOBODY, jail=jails[0]),
        own_hosts.vmm(api=jails[1] / "run" / "api", user=NOBODY, jail=jails[1]),
    )
    crossing = await own_hosts.crossing(guest, waiting)
    await crossing.start()
    await crossing.fails(Reason.PERMISSION_MISSING)
    assert list(outside.iterdir()) == []
