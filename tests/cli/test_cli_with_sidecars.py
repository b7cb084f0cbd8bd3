"""The command against two sidecars for real, and a process guest between them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from pageferry.demo.guests import Guest, Kind, start_guest
from pageferry.demo.scene import Scene
from pageferry.demo.sidecars import Sidecar, start_sidecar

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

MIB = 1 << 20
SECONDS = 30


class Hosts(NamedTuple):
    alpha: Sidecar
    beta: Sidecar
    source: Guest
    destination: Guest


@pytest.fixture
async def hosts(request: pytest.FixtureRequest) -> AsyncIterator[Hosts]:
    memory: int = getattr(request, "param", 16 * MIB)
    async with Scene() as scene:
        alpha = await start_sidecar(scene, "alpha")
        beta = await start_sidecar(scene, "beta")
        source = await start_guest(scene, "guest", Kind.PROCESS, memory, 3)
        destination = await start_guest(scene, "incoming", Kind.PROCESS, memory, 0, incoming=True)
        yield Hosts(alpha, beta, source, destination)


async def ferry(sidecar: Sidecar, *arguments: str, status: int = 0) -> str:
    """Run the command against a sidecar; return its stdout, or its stderr where it has to fail."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "pageferry.cli.main", "--insecure", "--address", sidecar.address, *arguments],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate()
    assert process.returncode == status, (out, err)
    return (err if status else out).decode()


async def test_a_guest_is_registered_moved_and_shown(hosts: Hosts):
    alpha, beta = hosts.alpha, hosts.beta
    to = ("--to", beta.address, "--to-name", "beta")

    registered = json.loads(await ferry(alpha, "register", "web", str(hosts.source.socket), "--json"))
    await ferry(beta, "register", "web", str(hosts.destination.socket))
    checked = json.loads(await ferry(alpha, "preflight", "--guest", "web", *to, "--json"))
    await ferry(alpha, "migrate", "web", *to, "--request-id", "first")
    again = json.loads(await ferry(alpha, "migrate", "web", *to, "--request-id", "first", "--json"))

    assert (registered["state"], registered["memory_bytes"]) == ("GUEST_STATE_RUNNING", 16 * MIB)
    assert checked["checks"]
    assert checked["destination_checks"]
    assert again["state"] == "MIGRATION_STATE_COMPLETED"
    listed = json.loads(await ferry(beta, "list", "--json"))
    assert [(guest["guest_id"], guest["state"]) for guest in listed["guests"]] == [("web", "GUEST_STATE_RUNNING")]
    assert [found["migration_id"] for found in listed["migrations"]] == [again["migration_id"]]
    assert "every page is at the destination" in await ferry(beta, "show", again["migration_id"])
    assert json.loads(await ferry(alpha, "watch", again["migration_id"], "--json"))["role"] == "ROLE_SOURCE"


async def test_a_guest_that_nobody_waits_for_stays_where_it_runs(hosts: Hosts):
    await ferry(hosts.alpha, "register", "web", str(hosts.source.socket))

    complaint = await ferry(hosts.alpha, "migrate", "web", "--to", hosts.beta.address, "--to-name", "beta", status=1)

    assert "UNKNOWN_GUEST" in complaint
    await hosts.source.runs_beyond(hosts.source.steps)


# As large as the guest cannot touch all of it while a second command starts.
@pytest.mark.parametrize("hosts", [160 * MIB], indirect=True, ids=["large"])
async def test_limits_hold_a_migration_back_and_let_it_go(hosts: Hosts):
    alpha, beta = hosts.alpha, hosts.beta
    await ferry(alpha, "register", "web", str(hosts.source.socket))
    await ferry(beta, "register", "web", str(hosts.destination.socket))
    start = ("migrate", "web", "--to", beta.address, "--to-name", "beta", "--push-rate", "1M", "--no-wait", "--json")

    started = json.loads(await ferry(alpha, *start))
    limited = json.loads(await ferry(alpha, "limits", started["migration_id"], "--push-rate", "0", "--json"))

    assert limited["push_bytes_per_second"] == 0
    await ferry(alpha, "watch", started["migration_id"])


async def test_what_is_unknown_or_over_is_refused_with_its_reason(hosts: Hosts):
    alpha = hosts.alpha

    assert "UNKNOWN_GUEST" in await ferry(alpha, "unregister", "web", status=2)
    assert "UNKNOWN_MIGRATION" in await ferry(alpha, "watch", "none", status=2)
    assert "VMM_UNREACHABLE" in await ferry(alpha, "register", "web", "/absent/vmm.sock", status=2)
    await ferry(alpha, "register", "web", str(hosts.source.socket))
    assert await ferry(alpha, "unregister", "web") == "web is forgotten\n"
