"""What keeps a guest of QEMU from being moved."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from qemu_process import SECONDS, needs_qemu_and_root, running_qemu

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu.movable import busy, obstacles, passed_through

MACHINE = ["-machine", "pc", "-m", "16"]


class Answers:
    """A monitor that says what a QEMU says in a machine that tests cannot have."""

    path = "qmp"

    def __init__(self, **changed: Any) -> None:
        self._answers: dict[str, Any] = {"query_migrate": {}, "query_target": {"arch": "x86_64"}, **changed}

    async def execute(self, command: str) -> Any:
        return self._answers[command.replace("-", "_")]

    async def hmp(self, line: str) -> str:
        listing = "Block Name PSize Offset Used Total\nmem 4 KiB 0x0 0x1000 0x1000\n"
        return str(self._answers.get(line.replace(" ", "_"), listing if line == "info ramblock" else ""))


async def obstacle(**changed: Any) -> str:
    found = await obstacles(Answers(**changed), os.getpid())  # type: ignore[arg-type]
    assert len(found) == 1
    return found[0]


async def test_a_guest_with_nothing_special_can_be_moved() -> None:
    assert await obstacles(Answers(), os.getpid()) == []  # type: ignore[arg-type]


async def test_another_architecture_is_named() -> None:
    assert "aarch64" in await obstacle(query_target={"arch": "aarch64"})


async def test_pages_of_1_gib_are_named() -> None:
    listing = "Block Name PSize Offset Used Total\nhuge 1 GiB 0x0 0x40000000 0x40000000\n"
    assert "huge is in pages of 1 GiB" in await obstacle(info_ramblock=listing)


async def test_a_device_in_another_process_is_named() -> None:
    tree = (
        'bus: pci.0\n  type PCI\n  dev: vhost-user-blk-pci, id "disk"\n    drive = ""\n  dev: virtio-net-pci, id ""\n'
    )
    assert "vhost-user-blk-pci disk" in await obstacle(info_qtree=tree)


@pytest.mark.parametrize("name", ["/dev/vfio/12", "/dev/vfio/vfio", "/dev/iommu", "/dev/vhost-vdpa-0"])
def test_hardware_that_is_passed_through_is_named(name: str) -> None:
    (told,) = passed_through(["/dev/kvm", "/dev/vhost-net", "/dev/net/tun", name, name])
    assert name in told
    assert "kvm" not in told


def test_devices_of_the_host_that_cause_page_faults_are_no_obstacle() -> None:
    assert passed_through(["/dev/kvm", "/dev/vhost-net", "/dev/net/tun", "/tmp/dev/vfio/1"]) == []


@pytest.mark.parametrize("answers", [{"query_migrate": []}, {"query_migrate": {"blocked-reasons": "x"}}])
async def test_an_answer_that_is_none_is_an_error(answers: dict[str, Any]) -> None:
    with pytest.raises(FerryError) as caught:
        await obstacles(Answers(**answers), os.getpid())  # type: ignore[arg-type]
    assert caught.value.reason is Reason.VMM_FAILED


async def test_a_process_that_is_gone_is_an_error() -> None:
    child = await asyncio.create_subprocess_exec("/bin/true")
    await child.wait()
    with pytest.raises(FerryError) as caught:
        await obstacles(Answers(), child.pid)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.VMM_GONE


async def backend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve as a vhost-user back-end without features: it is asked for them (request 1), all else needs no answer."""
    header = struct.Struct("<III")
    try:
        while True:
            request, _, size = header.unpack(await reader.readexactly(header.size))
            await reader.readexactly(size)
            if request == 1:
                writer.write(header.pack(1, 1 | 4, 8) + bytes(8))
    except (EOFError, ConnectionError):
        writer.close()


class TestWithQemu:
    pytestmark = needs_qemu_and_root

    async def test_a_usual_guest_can_be_moved(self, tmp_path: Path) -> None:
        devices = ["-vga", "std", "-nic", "user,model=virtio-net-pci", "-device", "virtio-balloon-pci"]
        async with running_qemu(tmp_path / "qmp", *MACHINE, *devices) as qemu:
            assert await obstacles(qemu.monitor, qemu.pid) == []
            assert await busy(qemu.monitor) is None

    async def test_an_incoming_qemu_has_no_obstacles_and_is_not_busy(self, tmp_path: Path) -> None:
        async with running_qemu(tmp_path / "qmp", *MACHINE, "-S", "-incoming", "defer") as qemu:
            assert await obstacles(qemu.monitor, qemu.pid) == []
            assert await busy(qemu.monitor) is None

    async def test_what_qemu_itself_names_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "files").mkdir()
        drive = f"file=fat:rw:{tmp_path / 'files'},format=vvfat,if=none,id=disk"
        async with running_qemu(tmp_path / "qmp", *MACHINE, "-drive", drive) as qemu:
            assert any("vvfat" in reason for reason in await obstacles(qemu.monitor, qemu.pid))

    async def test_a_network_served_by_another_process_is_named(self, tmp_path: Path) -> None:
        server = await asyncio.start_unix_server(backend, tmp_path / "backend")
        network = ["-chardev", f"socket,id=back,path={tmp_path / 'backend'}", "-netdev", "vhost-user,id=n,chardev=back"]
        async with server, running_qemu(tmp_path / "qmp", *MACHINE, *network) as qemu:
            found = await obstacles(qemu.monitor, qemu.pid)
        assert any("vhost-user n serves the guest from outside QEMU" in reason for reason in found)

    async def test_a_migration_of_qemus_own_must_end_first(self, tmp_path: Path) -> None:
        ours, theirs = socket.socketpair()
        async with running_qemu(tmp_path / "qmp", *MACHINE) as qemu:
            with ours, theirs:
                # Nobody reads at our end: the migration stays under way.
                await qemu.monitor.send_fd("out", theirs.fileno())
                events_on = {"capabilities": [{"capability": "events", "state": True}]}
                await qemu.monitor.execute("migrate-set-capabilities", events_on)
                with qemu.monitor.events("MIGRATION") as events:
                    await qemu.monitor.execute("migrate", {"uri": "fd:out"})
                    while (await qemu.monitor.wait_event(events, SECONDS))["data"]["status"] != "active":
                        pass
                    told = await busy(qemu.monitor)
                    await qemu.monitor.execute("migrate_cancel")
                    while (await qemu.monitor.wait_event(events, SECONDS))["data"]["status"] != "cancelled":
                        pass
            assert told is not None
            assert "active" in told
            assert await busy(qemu.monitor) is None
