"""Firecracker guests, with a stand-in VMM that keeps to its API and its hand-off, between two sidecars."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector
from child import DEADLINE, Child
from crossing import CANCELLED, COMPLETED, POSTCOPY, Crossing, Stage, until
from moving_guest import Guest
from sidecar_process import Sidecar

from firecracker_vmm.launch import COMMAND, environment
from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

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
            command += ["--jail", str(jail), "--uid", str(user)]
        elif user:
            popen |= {"user": user, "group": user, "extra_groups": []}
        if user:
            # The jailer gives its user a device of its own.
            device = os.open("/dev/userfaultfd", os.O_RDWR)
            os.set_inheritable(device, True)
            command += ["--device", str(device)]
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


@pytest.fixture
async def hosts(stage: Stage, alpha: Sidecar, beta: Sidecar) -> AsyncIterator[Hosts]:
    yield Hosts(stage, alpha, beta)
    await stage.leave()
    assert [*alpha.runtime_dir.iterdir(), *beta.runtime_dir.iterdir()] == []


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
    await crossing.waiting.gives_back(2)
    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    await crossing.arrives()


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
        ("hand-no-fd", Reason.HANDOFF_NO_FD),
        ("hand-not-uffd", Reason.HANDOFF_NO_FD),
        ("hand-sizes", Reason.HANDOFF_REGIONS),
        ("hand-fewer", Reason.HANDOFF_REGIONS),
        ("hand-more", Reason.HANDOFF_REGIONS),
        ("hand-offsets", Reason.HANDOFF_REGIONS),
        ("hand-page-size", Reason.HANDOFF_REGIONS),
        ("hand-huge", Reason.HANDOFF_MALFORMED),
        ("hand-silent", Reason.HANDOFF_TIMEOUT),
        ("hand-then-dies", Reason.VMM_UNREACHABLE),
        ("load-refuses", Reason.VMM_FAILED),
        ("load-silent", Reason.HANDOFF_TIMEOUT),
        ("load-dies", Reason.VMM_UNREACHABLE),
    ],
)
async def test_a_firecracker_that_does_not_take_it_leaves_the_guest_at_its_source(
    hosts: Hosts, behave: str, reason: Reason
) -> None:
    crossing = await hosts.usual("--working-set", "0.2", behave=behave)
    await crossing.start()
    failed = await crossing.fails(reason)
    assert len(failed.error.message) > 20
    await crossing.guest.is_intact()


@pytest.mark.parametrize("behave", ["pause-refuses", "create-refuses", "state-none", "state-huge", "state-link"])
async def test_a_firecracker_that_does_not_let_it_go_keeps_the_guest(hosts: Hosts, behave: str) -> None:
    crossing = await hosts.usual(source=("--behave", behave))
    await crossing.start()
    await crossing.fails(Reason.VMM_FAILED)
    await crossing.guest.is_intact()


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


def home_of_nobody(parent: Path, name: str) -> Path:
    home = parent / name
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return home


async def test_firecrackers_of_another_user_pass_a_guest_on(own_hosts: Hosts, stage: Stage) -> None:
    homes = [home_of_nobody(stage.directory, name) for name in ("a", "b")]
    guest, waiting = await asyncio.gather(
        own_hosts.vmm(api=homes[0] / "api", boot=16, user=NOBODY), own_hosts.vmm(api=homes[1] / "api", user=NOBODY)
    )
    crossing = await own_hosts.crossing(guest, waiting)
    await crossing.start()
    await crossing.arrives()
    assert [path for host in (own_hosts.source, own_hosts.destination) for path in host.runtime_dir.iterdir()] == []


def jail_of_nobody(parent: Path, name: str) -> Path:
    """A root directory as the jailer of Firecracker makes it: /run is the user's."""
    jail = parent / name
    jail.mkdir()
    home_of_nobody(jail, "run")
    return jail


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
