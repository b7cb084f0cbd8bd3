"""QEMUs that the destination's sidecar starts itself, from a template: its own children, which it traces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import uvloop
from child import DEADLINE
from crossing import COMPLETED, Stage, until
from qemu_crossing import SMALL, QemuHosts, traces_in, works
from sidecar_process import Sidecar

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb
from pageferryd.control.launched import Launched
from pageferryd.linux.userfaultfd import Userfaultfd
from pageferryd.vmm.qemu.attach import attach, detach
from pageferryd.vmm.qemu.blocks import RamBlock, find_blocks
from pageferryd.vmm.qemu.memory import paged
from pageferryd.vmm.qemu.monitor import Monitor
from qemu_guest.control import ControlPort
from qemu_guest.guest import Machine, QemuGuest
from qemu_guest.image import QEMU, what_is_missing

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.root,
    pytest.mark.userfaultfd,
    pytest.mark.qemu,
    pytest.mark.timeout(180),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
ATTACHES = 30


class TemplateQemu(QemuGuest):
    """A QEMU that a sidecar starts, at most one at a time, and that ends with the test."""

    def __init__(self, machine: Machine = SMALL) -> None:
        super().__init__(machine, incoming=True)
        self._pid = 0
        self._held = -1

    @property
    def pid(self) -> int:
        return self._pid

    def template(self) -> dict[str, object]:
        # It outlives who starts it: without setpriv, which ends a QEMU together with its parent.
        command = self._command()
        command = command[command.index(QEMU) :]
        command = [part.replace(str(self.qmp_path), "{socket}") for part in command]
        return {"driver": "qemu", "guests": "web-*", "command": command, "start_timeout": 5}

    async def start(self) -> None:
        """Make room for it."""
        self.directory.mkdir(mode=0o700)

    async def runs_as(self, pid: int) -> None:
        """Take the process that the sidecar has started."""
        self._held = os.pidfd_open(pid)
        self._pid = pid
        self._control = await ControlPort.connect(self.control_path)

    async def close(self) -> None:
        if self._held >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._held, signal.SIGKILL)
            await asyncio.to_thread(select.select, [self._held], [], [], DEADLINE)
            os.close(self._held)
        await super().close()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


async def host(stage: Stage, name: str, template: dict[str, object]) -> Sidecar:
    return await stage.sidecar(name, prefix=("env", f"PAGEFERRY_TEMPLATES={json.dumps([template])}"))


async def test_a_guest_crosses_into_a_qemu_that_is_started_for_it_and_outlives_its_sidecar(
    stage: Stage, stack: AsyncExitStack, alpha: Sidecar
) -> None:
    hosts = QemuHosts(stage, stack)
    started = await stack.enter_async_context(TemplateQemu())
    there = await host(stage, "there", started.template())
    await hosts.start(alpha, there)
    await hosts.begin()
    await hosts.becomes(there, COMPLETED)
    (found,) = await (await hosts.client(there)).list_guests()
    await started.runs_as(found.pid)
    assert found.vmm_address == f"{there.runtime_dir}/vmm-{hosts.name}.sock"
    shown = await hosts.arrives(started)
    assert shown.progress.pages_present == shown.progress.pages_total
    assert traces_in(started) == []

    assert await there.terminate() == 0
    await works(started)
    again = await stage.sidecar("again")
    known = await (await hosts.client(again)).register_guest(hosts.name, found.vmm_address, "qemu")
    assert (known.pid, known.state, known.movable) == (found.pid, pb.GUEST_STATE_RUNNING, True)


async def test_a_started_qemu_that_does_not_fit_ends_and_the_guest_works_on_where_it_was(
    stage: Stage, stack: AsyncExitStack, alpha: Sidecar
) -> None:
    hosts = QemuHosts(stage, stack)
    small = await stack.enter_async_context(TemplateQemu(Machine(memory_mib=96)))
    there = await host(stage, "there", small.template())
    await hosts.start(alpha, there)
    await hosts.begin()
    await hosts.fails(Reason.LAYOUT_MISMATCH)

    async def nothing_left() -> bool:
        return not there.left_behind and await (await hosts.client(there)).list_guests() == []

    await until(nothing_left, "the started QEMU, its socket and its output are gone")


def test_no_stop_of_a_started_qemu_is_lost_however_often_it_is_attached_to(tmp_path: Path) -> None:
    """Whoever waits for its end in the same process could be told of its stops instead of the tracer."""
    uvloop.run(attached_to_often(tmp_path))


async def attached_to_often(directory: Path) -> None:
    socket = directory / "qmp"
    command = [QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "32", "-S", "-incoming", "defer"]
    qemu = await Launched.start([*command, "-qmp", f"unix:{socket},server=on,wait=off"], directory / "qemu.log")
    try:
        monitor = await answers(socket)
        blocks = paged(await find_blocks(monitor, qemu.pid))
        for _ in range(ATTACHES):
            # Children that end meanwhile are waited for, too.
            other = await Launched.start(["true"], directory / "other.log")
            await asyncio.to_thread(attach_and_let_go, qemu.pid, blocks)
            assert await other.wait(DEADLINE)
            other.close()
        assert "userfaultfd" not in "".join(opened(qemu.pid))
        assert qemu.status is None
        assert (await monitor.execute("query-status"))["status"] == "inmigrate"
        await monitor.close()
    finally:
        qemu.kill()
        assert await qemu.wait(DEADLINE)
        qemu.close()
    assert qemu.status == -signal.SIGKILL


async def answers(socket: Path) -> Monitor:
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await Monitor.open(socket, DEADLINE)
            except FerryError as error:
                if error.reason is not Reason.VMM_UNREACHABLE:
                    raise
                await asyncio.sleep(0.02)


def opened(pid: int) -> list[str]:
    return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def attach_and_let_go(pid: int, blocks: list[RamBlock]) -> None:
    attached = attach(pid, blocks)
    uffd = Userfaultfd(attached.uffd)
    for block in blocks:
        uffd.unregister(block.host_address, block.size)
    os.close(attached.uffd)
    detach(pid, attached.remote)
