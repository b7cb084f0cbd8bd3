"""The device state between two QEMUs, with their RAM copied by hand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu_process import SECONDS, TICKS, Qemu, needs_qemu_and_root, running_qemu

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu import state as state_module
from pageferryd.vmm.qemu.blocks import find_blocks
from pageferryd.vmm.qemu.monitor import Monitor
from pageferryd.vmm.qemu.state import (
    await_state,
    close_plan,
    forget_way,
    load_state,
    machine_of,
    ready_to_load,
    ready_to_save,
    save_state,
)

pytestmark = needs_qemu_and_root

MACHINE = ["-machine", "pc", "-m", "32"]
INCOMING = ["-S", "-incoming", "defer"]


async def save(qemu: Qemu) -> bytes:
    plan = await ready_to_save(qemu.monitor)
    try:
        return await save_state(qemu.monitor, plan)
    finally:
        await close_plan(qemu.monitor, plan)


Load = Callable[[bytes], Awaitable[None]]


@asynccontextmanager
async def waiting(qemu: Qemu, seconds: float = SECONDS) -> AsyncIterator[Load]:
    """Have it wait for its one state."""
    plan = await ready_to_load(qemu.monitor)
    with await await_state(qemu.monitor, plan) as connection:
        yield lambda state: load_state(qemu.monitor, state, plan, connection, seconds)
    await forget_way(qemu.monitor)


async def load(qemu: Qemu, state: bytes, seconds: float = SECONDS) -> None:
    async with waiting(qemu, seconds) as into:
        await into(state)


async def move_ram(source: Qemu, destination: Qemu) -> None:
    there = {block.name: block for block in (await find_blocks(destination.monitor, destination.pid)).located}
    for block in (await find_blocks(source.monitor, source.pid)).located:
        # In pieces, as one read of a whole guest's memory would be cut short.
        for offset in range(0, block.size, 1 << 20):
            size = min(1 << 20, block.size - offset)
            destination.write(there[block.name].host_address + offset, source.read(block.host_address + offset, size))


async def clock(qemu: Qemu) -> int:
    """Where in QEMU's process the BIOS counts timer interrupts."""
    found = await find_blocks(qemu.monitor, qemu.pid)
    return next(block.host_address for block in found.located if block.name == "pc.ram") + TICKS


async def ticks(qemu: Qemu) -> int:
    return int(struct.unpack("<I", qemu.read(await clock(qemu), 4))[0])


async def runs_on(qemu: Qemu) -> None:
    """Wait until its BIOS counts timer interrupts."""
    address = await clock(qemu)
    before = qemu.read(address, 4)
    async with asyncio.timeout(SECONDS):
        while qemu.read(address, 4) == before:  # noqa: ASYNC110 - nothing but its memory tells
            await asyncio.sleep(0.01)


def kept_bytes(qemu: Qemu) -> list[int]:
    """The sizes of the files that QEMU was given and still holds."""
    opened = Path(f"/proc/{qemu.pid}/fd").iterdir()
    return [entry.stat().st_size for entry in opened if "pageferry-state" in str(entry.readlink())]


async def status(qemu: Qemu) -> str:
    return str((await qemu.monitor.execute("query-status"))["status"])


async def refused(loading: Awaitable[None]) -> FerryError:
    with pytest.raises(FerryError) as caught:
        await loading
    return caught.value


async def saved(tmp_path: Path, *arguments: str) -> bytes:
    async with running_qemu(tmp_path / "source", *(arguments or MACHINE), "-S") as source:
        return await save(source)


def resealed(body: bytes) -> bytes:
    """A state whose digest is right, whatever is in it."""
    description = b'{"sha256":"%s"}' % hashlib.sha256(body).hexdigest().encode()
    return body + struct.pack(">BI", 6, len(description)) + description


def body_of(state: bytes) -> bytes:
    body = state[: -len(resealed(b""))]
    assert resealed(body) == state
    return body


async def test_a_machines_name_is_the_full_one(tmp_path: Path) -> None:
    async with running_qemu(tmp_path / "qmp", *MACHINE, "-S") as qemu:
        name = await machine_of(qemu.monitor)
        known = await qemu.monitor.execute("query-machines")
    assert [machine.get("alias") for machine in known if machine["name"] == name] == ["pc"]


async def test_a_guest_that_was_moved_runs_on(tmp_path: Path) -> None:
    async with (
        running_qemu(tmp_path / "source", *MACHINE) as source,
        running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination,
    ):
        await source.bios_ran()
        await source.monitor.execute("stop")
        state = await save(source)
        await move_ram(source, destination)
        await load(destination, state)
        assert await status(destination) == "paused"
        assert await ticks(destination) == await ticks(source) > 0
        await destination.monitor.execute("cont")
        await runs_on(destination)
        assert await status(destination) == "running"
        assert await status(source) == "paused"


async def test_a_destination_that_was_not_told_to_wait_does_not_start_by_itself(tmp_path: Path) -> None:
    state = await saved(tmp_path)
    async with running_qemu(tmp_path / "destination", *MACHINE, "-incoming", "defer") as destination:
        await load(destination, state)
        assert await status(destination) == "paused"


async def test_a_source_goes_on_after_its_state_was_saved(tmp_path: Path) -> None:
    async with running_qemu(tmp_path / "source", *MACHINE) as source:
        await source.bios_ran()
        await source.monitor.execute("stop")
        assert len({len(await save(source)) for _ in range(2)}) == 1
        await source.monitor.execute("cont")
        await runs_on(source)


async def test_a_plan_serves_more_than_one_save(tmp_path: Path) -> None:
    async with running_qemu(tmp_path / "source", *MACHINE, "-S") as source:
        plan = await ready_to_save(source.monitor)
        first = await save_state(source.monitor, plan)
        assert await save_state(source.monitor, plan) == first
        await close_plan(source.monitor, plan)


async def test_a_source_keeps_nothing_of_what_it_saved(tmp_path: Path) -> None:
    async with running_qemu(tmp_path / "source", *MACHINE) as source:
        await source.monitor.execute("stop")
        await save(source)
        assert not any(kept_bytes(source))
        # QEMU closes what it was told to let go of once the guest runs and the monitor's client leaves.
        await source.monitor.execute("cont")
        await source.monitor.close()
        monitor = await Monitor.open(tmp_path / "source", SECONDS)
        assert await monitor.execute("query-fdsets") == []
        await monitor.close()


@pytest.mark.parametrize("model", ["virtio-blk-pci", "ide-hd"])
async def test_the_lock_on_a_disk_moves_with_the_guest_and_comes_back_on_an_undo(tmp_path: Path, model: str) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        os.truncate(file.fileno(), 1 << 20)
    disk = ["-drive", f"file={image},format=raw,if=none,id=disk,file.locking=on", "-device", f"{model},drive=disk"]
    async with (
        running_qemu(tmp_path / "source", *MACHINE, *disk) as source,
        running_qemu(tmp_path / "destination", *MACHINE, *disk, *INCOMING) as destination,
        running_qemu(tmp_path / "second", *MACHINE, *disk, *INCOMING) as second,
    ):
        await source.bios_ran()
        await source.monitor.execute("stop")
        state = await save(source)
        await move_ram(source, destination)
        await load(destination, state)
        # Undone: the destination has the state, and the source goes on all the same.
        await source.monitor.execute("cont")
        await runs_on(source)
        with pytest.raises(FerryError, match="lock"):
            await destination.monitor.execute("cont")
        # Once more, and to the end.
        await source.monitor.execute("stop")
        state = await save(source)
        await move_ram(source, second)
        await load(second, state)
        await second.monitor.execute("cont")
        await runs_on(second)
        with pytest.raises(FerryError, match="lock"):
            await source.monitor.execute("cont")


async def test_a_state_above_the_limit_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "MAX_STATE_BYTES", 4096)
    with pytest.raises(FerryError, match="at most") as caught:
        await saved(tmp_path)
    assert caught.value.reason is Reason.VMM_FAILED


async def test_a_damaged_state_is_refused_and_the_destination_still_takes_the_right_one(tmp_path: Path) -> None:
    state = await saved(tmp_path)
    changed = bytearray(state)
    changed[len(state) // 2] ^= 1
    async with (
        running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination,
        waiting(destination) as into,
    ):
        for damaged in (b"", state[:4], state[:8], state[:-1], state[: len(state) // 2], state + b"\0", bytes(changed)):
            assert (await refused(into(damaged))).reason is Reason.VMM_FAILED
        assert (await refused(into(b"\x7fELF" + state[4:]))).reason is Reason.VMM_FAILED
        assert (await refused(into(bytes(66 << 20)))).reason is Reason.VMM_FAILED
        assert await status(destination) == "inmigrate"
        await into(state)
        assert await status(destination) == "paused"


async def test_the_state_of_another_machine_is_refused_by_name(tmp_path: Path) -> None:
    state = await saved(tmp_path, "-machine", "q35", "-m", "32")
    async with (
        running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination,
        waiting(destination) as into,
    ):
        error = await refused(into(state))
        assert error.reason is Reason.VMM_FAILED
        assert "pc-q35" in error.message
        assert await status(destination) == "inmigrate"


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.999])
async def test_a_state_that_qemu_does_not_take_is_an_error(tmp_path: Path, cut: float) -> None:
    body = body_of(await saved(tmp_path))
    async with running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination:
        error = await refused(load(destination, resealed(body[: int(len(body) * cut)])))
        # Before 9.1 an incoming QEMU ends on what it does not take.
        assert error.reason in (Reason.VMM_GONE, Reason.VMM_FAILED)


async def test_the_state_of_a_machine_with_other_devices_is_an_error(tmp_path: Path) -> None:
    state = await saved(tmp_path, *MACHINE, "-device", "virtio-rng-pci")
    async with running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination:
        assert (await refused(load(destination, state))).reason in (Reason.VMM_GONE, Reason.VMM_FAILED)


async def test_a_running_guest_is_not_touched_by_a_load(tmp_path: Path) -> None:
    state = await saved(tmp_path)
    async with running_qemu(tmp_path / "qmp", *MACHINE) as qemu:
        error = await refused(load(qemu, state))
        assert error.reason is Reason.VMM_FAILED
        assert "-incoming defer" in error.message
        assert await status(qemu) == "running"


async def test_a_qemu_that_waits_for_its_state_waits_on_when_it_is_hung_up_on(tmp_path: Path) -> None:
    async with running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination:
        plan = await ready_to_load(destination.monitor)
        (await await_state(destination.monitor, plan)).close()
        with pytest.raises(FerryError, match="already"):
            await await_state(destination.monitor, plan)
        assert await status(destination) == "inmigrate"


async def test_a_qemu_that_gave_up_before_there_was_a_state_says_so(tmp_path: Path) -> None:
    state = await saved(tmp_path)
    async with running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination:
        plan = await ready_to_load(destination.monitor)
        with await await_state(destination.monitor, plan) as connection, connection.dup() as other:
            with destination.monitor.events("MIGRATION") as events:
                other.sendall(b"no state of a QEMU")
                # It ends, or says that it has failed.
                with contextlib.suppress(FerryError):
                    while (await destination.monitor.wait_event(events, SECONDS))["data"]["status"] != "failed":
                        pass
            error = await refused(load_state(destination.monitor, state, plan, connection, SECONDS))
        assert error.reason in (Reason.VMM_GONE, Reason.VMM_FAILED)


async def write_half(connection: socket.socket, state: bytes) -> bool:
    await asyncio.get_running_loop().sock_sendall(connection, state[: len(state) // 2])
    return True


async def test_a_qemu_that_is_killed_while_it_loads_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = await saved(tmp_path)
    monkeypatch.setattr(state_module, "_write", write_half)
    async with running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination:
        with destination.monitor.events("MIGRATION") as events:
            loading = asyncio.create_task(load(destination, state))
            while (await destination.monitor.wait_event(events, SECONDS))["data"]["status"] != "active":
                pass
            destination.process.kill()
            with pytest.raises(FerryError) as caught:
                await loading
        assert caught.value.reason is Reason.VMM_GONE


async def test_a_load_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = await saved(tmp_path)
    monkeypatch.setattr(state_module, "_write", write_half)
    async with running_qemu(tmp_path / "destination", *MACHINE, *INCOMING) as destination:
        with pytest.raises(FerryError) as caught:
            await load(destination, state, 0.3)
        assert caught.value.reason in (Reason.VMM_UNREACHABLE, Reason.VMM_GONE)
