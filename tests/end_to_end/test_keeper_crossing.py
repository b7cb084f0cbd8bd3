"""Sidecars under the keeper: killed, they start again by themselves, and find the memory of guests where it was."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest
from crossing import PAUSED, POSTCOPY, Crossing, Stage
from sidecar_process import Sidecar, free_port

from pageferry.errors import Reason

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


class KeptSidecar(Sidecar):
    """A sidecar that a keeper starts, and starts again; `pid` is the keeper's."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, more_arguments=("--keeper",), **settings)

    @property
    def kept_pid(self) -> int:
        """The sidecar's own."""
        pids: list[int] = [event["pid"] for event in self.events if event.get("event") == "sidecar_started"]
        return pids[-1]

    async def killed(self) -> None:
        """Kill the sidecar alone, and wait until the next one serves."""
        since = len(self.events)
        os.kill(self.kept_pid, signal.SIGKILL)
        await self.event("ready", since)

    def close(self) -> None:
        """End both: a keeper's sidecar outlives it, and would outlive the test."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.kept_pid, signal.SIGKILL)
        super().close()


async def under_way(stage: Stage, *options: str, **keywords: Any) -> Crossing:
    """A guest between two kept sidecars, whose memory comes slowly."""
    made = [
        await stage.sidecar(
            name,
            KeptSidecar,
            listen=[f"127.0.0.1:{free_port()}"],
            lane_listen=f"127.0.0.1:{free_port()}",
            drain_seconds=0.1,
        )
        for name in ("source", "destination")
    ]
    crossing = await stage.crossing(made[0], made[1], *options, **keywords)
    await crossing.start(push_bytes_per_second=2 << 20)
    await crossing.becomes(crossing.at_destination, POSTCOPY)
    await crossing.becomes(crossing.at_source, POSTCOPY)
    return crossing


@pytest.mark.parametrize("end", ["source", "destination"])
async def test_a_kept_sidecar_that_is_killed_goes_on(stage: Stage, end: str) -> None:
    crossing = await under_way(stage)
    kept = crossing.source if end == "source" else crossing.destination
    assert isinstance(kept, KeptSidecar)
    await kept.killed()
    await crossing.arrives()


async def test_what_was_kept_is_let_go_of_at_the_end(stage: Stage) -> None:
    crossing = await under_way(stage, "--backing", "shmem")
    await crossing.arrives()
    for end in (crossing.source, crossing.destination):
        assert end.fds["memfd:guest"] == 0
        assert end.fds["anon_inode:[userfaultfd]"] == 0
        assert [path for path in end.runtime_dir.iterdir() if not path.name.startswith("keeper-")] == []


async def test_memory_that_was_kept_outlives_the_vmm_and_the_sidecar_of_its_source(stage: Stage) -> None:
    crossing = await under_way(stage, "--backing", "shmem")
    assert isinstance(crossing.source, KeptSidecar)
    crossing.guest.process.kill()
    await crossing.guest.exit_code()
    await crossing.source.killed()
    await crossing.arrives()


async def test_private_memory_ends_with_its_vmm_and_the_guest_waits_for_it(stage: Stage) -> None:
    crossing = await under_way(stage, "--working-set", "0.1")
    assert isinstance(crossing.source, KeptSidecar)
    crossing.guest.process.kill()
    await crossing.guest.exit_code()
    await crossing.source.killed()
    paused = await crossing.becomes(crossing.at_destination, PAUSED)
    assert paused.error.reason in (Reason.UNKNOWN_MIGRATION, Reason.SOURCE_UNREACHABLE, Reason.LANE_LOST)
    assert crossing.waiting is not None
    assert crossing.waiting.wrongs == []


async def test_an_upgrade_goes_on_with_what_is_under_way(stage: Stage) -> None:
    crossing = await under_way(stage)
    for kept in (crossing.source, crossing.destination):
        since = len(kept.events)
        kept.signal(signal.SIGHUP)
        await kept.event("ready", since)
    await crossing.arrives()
