"""The same failures with a Linux guest in a stock QEMU: none of them loses it.

All of them with PAGEFERRY_CHAOS=long, else two: each takes QEMUs and their guests to start.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from chaos_cells import LONG, STEPS, Cell, Place, Stage, Who
from chaos_hosts import Pair
from qemu_crossing import SMALL, works
from trial import Trial, eventually
from verdict import SETTLE_SECONDS, End

from qemu_guest.guest import QemuGuest
from qemu_guest.image import what_is_missing

MISSING = what_is_missing()
ENDS = (Who.SOURCE_KILLED, Who.SOURCE_TOLD, Who.DESTINATION_KILLED, Who.DESTINATION_TOLD, Who.BOTH_KILLED, Who.CUT)
SHORT = ("source-killed:commit-request-lost", "destination-killed:pushpages-answer-lost")
NAMES = ("prepare-answer", "handover-answer", "commit-request", "pushpages-answer", "complete-request")
CELLS = [
    Cell(who, step, deliver=False) for who in ENDS for step in STEPS if step.name in NAMES and step.place is Place.WIRE
]

pytestmark = [
    pytest.mark.root,
    pytest.mark.userfaultfd,
    pytest.mark.qemu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


class QemuEnd:
    """A QEMU as a trial sees it."""

    def __init__(self, qemu: QemuGuest) -> None:
        self.qemu = qemu
        self.socket_path = str(qemu.qmp_path)

    @property
    def alive(self) -> bool:
        process = self.qemu._process
        return process is not None and process.returncode is None

    async def runs(self) -> bool:
        if not self.alive:
            return False
        try:
            return bool((await self.qemu.monitor.execute("query-status"))["running"])
        except (OSError, EOFError):
            return False

    def close(self) -> None:
        """Whoever started it ends it."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        named = {one.name: one for one in CELLS}
        chosen = CELLS if LONG or metafunc.config.option.keyword else [named[name] for name in SHORT]
        metafunc.parametrize("cell", chosen, ids=lambda cell: f"qemu-{cell.name}")


@pytest.fixture
async def trial(short_path: Path) -> AsyncIterator[Trial]:
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(Pair(short_path, 0))
        guest = await stack.enter_async_context(QemuGuest(SMALL))
        waiting = await stack.enter_async_context(QemuGuest(SMALL, incoming=True))
        ends = QemuEnd(guest), QemuEnd(waiting)
        made = Trial(pair, "qemu", *ends, f"web-{uuid.uuid4().hex[:8]}", short_path, "", driver="qemu")
        for host, end in zip(pair.hosts, ends, strict=True):
            await host.client.register_guest(made.guest_id, end.socket_path, "qemu")
        yield made
        await made.end()


async def settled(trial: Trial) -> End:
    """Wait until nothing is under way, and somebody runs the guest."""
    found: list[End] = []

    async def look() -> bool:
        if await trial.pair.source.active() or await trial.pair.destination.active():
            return False
        running = [await end.runs() for end in (trial.guest, trial.waiting)]
        assert running != [True, True], "both ends run the guest"
        found[:] = [end for end, is_it in zip((End.STAYED, End.ARRIVED), running, strict=True) if is_it]
        return bool(found)

    assert await eventually(look, 2 * SETTLE_SECONDS), (
        f"not settled; {trial.pair.source.log()}\n{trial.pair.destination.log()}"
    )
    return found[0]


async def test_a_single_failure_loses_no_linux_guest(trial: Trial, cell: Cell) -> None:
    hold = trial.hold(cell.step, 30.0)
    await trial.start(push_bytes_per_second=32 << 20)
    await hold.reached()
    await trial.strike(cell, hold)
    await trial.hurry()
    end = await settled(trial)
    assert end is End.ARRIVED or cell.step.stage < Stage.AFTER
    where = trial.waiting if end is End.ARRIVED else trial.guest
    if end is End.ARRIVED:
        await where.qemu.attach()
    await works(where.qemu)
    if end is End.ARRIVED:
        await asyncio.wait_for(trial.guest.qemu.exit_code(), SETTLE_SECONDS)
