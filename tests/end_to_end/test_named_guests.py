"""Guests that are named in the configuration, and VMMs that the destination starts from a template."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from crossing import COMPLETED, Crossing, Stage, until
from sidecar_process import Sidecar

from pageferry.client import SidecarClient
from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

VMM = [sys.executable, "-m", "pageferry.guests.process", "--socket", "{socket}", "--incoming", "--detach"]


def template(*command: str, guests: str = "web-*") -> dict[str, Any]:
    return {"driver": "vmm", "guests": guests, "command": list(command), "start_timeout": 5}


async def host(stage: Stage, name: str, **tables: Any) -> Sidecar:
    """Start a sidecar with lists of tables, which the environment takes as JSON."""
    values = [f"PAGEFERRY_{table.upper()}={json.dumps(value)}" for table, value in tables.items()]
    return await stage.sidecar(name, prefix=("env", *values))


async def listed(client: SidecarClient, guest_id: str) -> pb.Guest | None:
    return next((guest for guest in await client.list_guests() if guest.guest_id == guest_id), None)


async def moving(stage: Stage, source: Sidecar, destination: Sidecar, guest_id: str = "web-1") -> Crossing:
    """Return a guest that runs at `source`, registered there; nothing waits for it at `destination`."""
    guest = await stage.guest("source")
    clients = await stage.client(source), await stage.client(destination)
    await stage.register(clients[0], guest_id, guest)
    return Crossing(guest_id, source, destination, *clients, guest, None)


async def arrived(stage: Stage, crossing: Crossing) -> pb.Guest:
    """Wait until the guest runs in a VMM that the destination started; that is killed at the end of the test."""
    await crossing.both_become(COMPLETED)
    found = await listed(crossing.at_destination, crossing.guest_id)
    assert found is not None
    stage.stack.callback(end, found.pid)
    assert found.state == pb.GUEST_STATE_RUNNING
    assert found.movable
    assert found.vmm_address == f"{crossing.destination.runtime_dir}/vmm-{crossing.guest_id}.sock"
    return found


def is_process(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def test_a_configured_guest_is_listed_before_it_runs_leaves_for_a_started_vmm_and_comes_back(
    stage: Stage,
) -> None:
    endpoint = stage.directory / "web-1.sock"
    here = await host(stage, "here", guests=[{"name": "web-1", "driver": "vmm", "endpoint": str(endpoint)}])
    there = await host(stage, "there", templates=[template(*VMM, "--memory", "16M")])
    at_here, at_there = await stage.client(here), await stage.client(there)

    early = await listed(at_here, "web-1")
    assert early is not None
    assert early.state == pb.GUEST_STATE_UNSPECIFIED
    assert not early.movable
    assert f"nobody listens at {endpoint}" in early.obstacles[0]

    guest = await stage.guest("web-1")
    # What its start script does anyway.
    running = await at_here.register_guest("web-1", str(endpoint))
    assert (running.state, running.movable) == (pb.GUEST_STATE_RUNNING, True)

    checks = (await at_here.preflight("web-1", there.address)).destination_checks
    check = next(one for one in checks if one.name == "guest")
    assert (check.status, check.detail) == (
        pb.CHECK_STATUS_OK,
        "a VMM of kind vmm would be started for guest web-1 by a template",
    )

    away = Crossing("web-1", here, there, at_here, at_there, guest, None)
    await away.start()
    vmm = await arrived(stage, away)
    await guest.exit_code()
    assert (await listed(at_here, "web-1")) == early

    # The operator has another VMM wait where the first one was; nothing is registered anew.
    waiting = await stage.guest("web-1", "--incoming")
    back = Crossing("web-1", there, here, at_there, at_here, guest, waiting)
    await back.start()
    await back.both_become(COMPLETED)
    await waiting.runs_on()
    await waiting.is_intact()

    async def nothing_left() -> bool:
        gone = not is_process(vmm.pid) and await listed(at_there, "web-1") is None
        return gone and not there.left_behind

    await until(nothing_left, "the started VMM, its socket and its output are gone")


async def test_a_started_vmm_runs_on_when_the_sidecar_ends(stage: Stage, alpha: Sidecar) -> None:
    there = await host(stage, "there", templates=[template(*VMM, "--memory", "16M")])
    crossing = await moving(stage, alpha, there)
    await crossing.start()
    vmm = await arrived(stage, crossing)

    assert await there.terminate() == 0
    again = await host(stage, "again")
    found = await (await stage.client(again)).register_guest("web-1", vmm.vmm_address)
    assert (found.pid, found.state) == (vmm.pid, pb.GUEST_STATE_RUNNING)


async def test_a_template_whose_command_fails_leaves_the_guest_at_its_source(stage: Stage, alpha: Sidecar) -> None:
    there = await host(
        stage, "there", templates=[template("sh", "-c", "echo no disk for $0; exit 1", "{guest}{socket}")]
    )
    crossing = await moving(stage, alpha, there)
    await crossing.start()
    failed = await crossing.fails(Reason.VMM_FAILED)
    assert "it said last: no disk for web-1" in failed.error.message
    assert there.left_behind == []


async def test_a_started_vmm_with_other_memory_is_ended_with_the_migration(stage: Stage, alpha: Sidecar) -> None:
    there = await host(stage, "there", templates=[template(*VMM, "--memory", "8M")])
    crossing = await moving(stage, alpha, there)
    for _ in range(2):
        # Each time a VMM of its own: what was corrected meanwhile would count.
        await crossing.start(request_id=uuid.uuid4().hex)
        await crossing.fails(Reason.LAYOUT_MISMATCH)

        async def nothing_left() -> bool:
            return not there.left_behind and await crossing.at_destination.list_guests() == []

        await until(nothing_left, "the started VMM is gone")


async def test_a_guest_that_no_template_is_for_is_unknown_as_ever(stage: Stage, alpha: Sidecar) -> None:
    there = await host(stage, "there", templates=[template(*VMM, "--memory", "16M")])
    crossing = await moving(stage, alpha, there, "db-1")
    await crossing.start()
    await crossing.fails(Reason.UNKNOWN_GUEST)


async def test_a_cancelled_migration_takes_the_vmm_that_is_being_started_with_it(stage: Stage, alpha: Sidecar) -> None:
    there = await host(stage, "there", templates=[template("sh", "-c", "echo $$; exec sleep 1000", "{socket}")])
    crossing = await moving(stage, alpha, there)
    migration = await crossing.start()
    output = there.runtime_dir / "vmm-web-1.log"

    async def pid() -> int:
        return int((await asyncio.to_thread(output.read_text)).strip() or 0) if output.exists() else 0

    started = await until(pid, "the command runs")
    stage.stack.callback(end, started)
    await crossing.at_source.cancel_migration(migration.migration_id)

    async def nothing_left() -> bool:
        return not is_process(started) and not there.left_behind

    await until(nothing_left, "the command is gone")
    await crossing.runs_at_source()
