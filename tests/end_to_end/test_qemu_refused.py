"""QEMUs that cannot be moved, or cannot take a guest: a clear error, and the guest works on where it was."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from crossing import FAILED, POSTCOPY, Stage
from qemu_crossing import QemuHosts, traces_in, works
from sidecar_process import Sidecar

from pageferry.errors import FerryError, Reason
from qemu_guest.guest import Machine
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
async def hosts(stage: Stage, alpha: Sidecar, beta: Sidecar) -> AsyncIterator[QemuHosts]:
    async with AsyncExitStack() as stack:
        made = QemuHosts(stage, stack)
        await made.start(alpha, beta)
        yield made


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        pytest.param(Machine(memory_mib=96), Reason.LAYOUT_MISMATCH, id="less memory"),
        pytest.param(Machine(memory_mib=128, vga=True), Reason.LAYOUT_MISMATCH, id="another device"),
        pytest.param(Machine(memory_mib=128, machine="q35"), Reason.VMM_MISMATCH, id="another machine"),
    ],
)
async def test_a_qemu_that_is_not_the_same_is_refused_before_the_guest_stops(
    hosts: QemuHosts, machine: Machine, reason: Reason
) -> None:
    waiting = await hosts.waits(machine=machine)
    await hosts.begin()
    shown = await hosts.fails(reason)
    assert not shown.HasField("downtime")
    assert traces_in(waiting) == []


async def test_more_vcpus_than_the_source_has_are_refused_and_the_guest_works_on(hosts: QemuHosts) -> None:
    """Nothing shows that before the state is loaded, for which the guest stands still."""
    await hosts.waits(machine=Machine(memory_mib=128, vcpus=2))
    await hosts.begin()
    await hosts.fails(Reason.VMM_GONE, Reason.VMM_FAILED)


async def test_a_guest_that_its_qemu_is_moving_already_is_not_moved(hosts: QemuHosts) -> None:
    await hosts.waits()
    await hosts.guest.monitor.execute("migrate-set-parameters", **{"max-bandwidth": 4096})
    await hosts.guest.monitor.execute("migrate", uri="exec:cat > /dev/null")
    await hosts.begin()
    shown = await hosts.fails(Reason.GUEST_NOT_MOVABLE)
    assert "migration of its own" in shown.error.message
    await hosts.guest.monitor.execute("migrate_cancel")


async def test_a_paused_guest_is_not_moved(hosts: QemuHosts) -> None:
    await hosts.guest.monitor.execute("stop")
    await hosts.begin()
    await hosts.becomes(hosts.hosts[0], FAILED)
    await hosts.guest.monitor.execute("cont")
    await hosts.fails(Reason.GUEST_NOT_RUNNING)


async def test_a_waiting_qemu_that_has_ended_is_named(hosts: QemuHosts) -> None:
    waiting = await hosts.waits()
    await waiting.close()
    await hosts.begin()
    shown = await hosts.fails(Reason.VMM_UNREACHABLE)
    assert str(waiting.qmp_path) in shown.error.message


async def test_a_waiting_qemu_that_hangs_is_given_up(hosts: QemuHosts) -> None:
    waiting = await hosts.waits()
    await (await hosts.client(hosts.hosts[1])).list_guests()
    waiting.signal(signal.SIGSTOP)
    try:
        await hosts.begin()
        await hosts.fails(Reason.VMM_UNREACHABLE, Reason.HANDOFF_TIMEOUT)
    finally:
        waiting.signal(signal.SIGCONT)


async def test_a_qemu_that_runs_already_takes_no_guest(hosts: QemuHosts) -> None:
    waiting = await hosts.waits()
    await waiting.monitor.execute("migrate-incoming", uri="exec:cat /dev/null; sleep 600")
    await hosts.begin()
    await hosts.fails(Reason.VMM_FAILED, Reason.VMM_UNREACHABLE, Reason.GUEST_NOT_INCOMING, Reason.VMM_GONE)


async def test_a_destination_qemu_that_dies_with_the_guest_is_said_so(hosts: QemuHosts) -> None:
    waiting = await hosts.waits()
    await hosts.begin(push_disabled=True)
    await hosts.becomes(hosts.hosts[1], POSTCOPY)
    await waiting.close()
    with pytest.raises(AssertionError, match="VMM_GONE"):
        await hosts.becomes(hosts.hosts[0])


async def test_a_sidecar_that_may_not_trace_says_what_it_needs(stage: Stage, hosts: QemuHosts) -> None:
    weak = await stage.sidecar("weak", prefix=("setpriv", "--bounding-set", "-sys_ptrace"))
    waiting = await hosts.qemu(incoming=True)
    with pytest.raises(FerryError) as refused:
        await hosts.register(weak, waiting)
    assert refused.value.reason is Reason.PERMISSION_MISSING
    assert "CAP_SYS_PTRACE" in refused.value.message
    assert traces_in(waiting) == []


async def test_a_socket_that_is_no_monitor_is_refused(stage: Stage, hosts: QemuHosts) -> None:
    client = await hosts.client(hosts.hosts[0])
    for path in (hosts.guest.control_path, hosts.guest.directory / "nothing"):
        with pytest.raises(FerryError) as refused:
            await client.register_guest("other", str(path), "qemu")
        assert refused.value.reason in {Reason.VMM_UNREACHABLE, Reason.VMM_FAILED}
    await works(hosts.guest)
