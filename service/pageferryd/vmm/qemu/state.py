"""The device state of a QEMU, without its RAM.

`xen-save-devices-state` (qmp_xen_save_devices_state in migration/savevm.c there; nothing in it needs Xen) writes every
section of a migration stream but RAM's, and leaves out the section that names the machine, with which an ordinary
incoming migration begins. That is put in here, and a digest at the end, where QEMU expects a description of the
stream and reads none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from pageferryd.vmm.qemu.monitor import Events, Monitor

MAX_STATE_BYTES = 64 << 20
_SAVE = "xen-save-devices-state"
_SAVE_SECONDS = 30.0
_HEAD = struct.pack(">II", 0x5145564D, 3)  # "QEVM", QEMU_VM_FILE_VERSION
_CONFIGURATION = 0x07
_DESCRIPTION = 0x06
_SECTION = struct.Struct(">BI")
_DIGEST_BYTES = len(hashlib.sha256(b"").hexdigest())
_TAIL_BYTES = _SECTION.size + len('{"sha256":""}') + _DIGEST_BYTES
_MAX_NAME = 255
_FD_NAME = "pageferry-state"
_RECEIVES_ERRORS = (9, 1)
_ON = ("late-block-activate", "events")


async def machine_of(monitor: Monitor) -> str:
    """Return the machine's full name, as `pc-i440fx-7.2` and not as its alias `pc`."""
    kind = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    name = kind.removesuffix("-machine") if isinstance(kind, str) else ""
    if not 0 < len(name.encode()) <= _MAX_NAME:
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} does not tell what machine it is")
    return name


class SavePlan(NamedTuple):
    """What a QEMU was given and told before its guest stood still: a file in memory, and that file's number there."""

    machine: str
    memory: int
    fdset: int


async def ready_to_save(monitor: Monitor) -> SavePlan:
    """Do all of a save for which the guest need not stand; `close_plan` must follow. FerryError as in `save_state`."""
    if _SAVE not in await monitor.commands():
        raise FerryError(
            Reason.VMM_FAILED, f"QEMU at {monitor.path} does not know {_SAVE}; use one with all commands of migration"
        )
    machine = await machine_of(monitor)
    memory = os.memfd_create("pageferry-state", os.MFD_CLOEXEC)
    try:
        return SavePlan(machine, memory, await _give(monitor, memory))
    except BaseException:
        os.close(memory)
        raise


async def save_state(monitor: Monitor, plan: SavePlan) -> bytes:
    """Return the device state of a stopped guest, as `load_state` takes it, through memory: no disk is written.

    The guest's disks are let go, so that the destination can lock them; `cont` takes them back. FerryError: VMM_FAILED
    where the guest runs, QEMU cannot save, or the state is above MAX_STATE_BYTES, and what the monitor raises.
    """
    if _member(await monitor.execute("query-status"), "running") is not False:
        raise FerryError(Reason.VMM_FAILED, f"the guest of QEMU at {monitor.path} runs: stop it before it is saved")
    # `live` makes QEMU let go of the disks of a guest that is stopped (bdrv_inactivate_all).
    await monitor.execute(_SAVE, {"filename": f"/dev/fdset/{plan.fdset}", "live": True}, _SAVE_SECONDS)
    size = os.fstat(plan.memory).st_size
    if size > MAX_STATE_BYTES:
        raise FerryError(
            Reason.VMM_FAILED,
            f"the device state of QEMU at {monitor.path} has {size >> 20} MiB; {MAX_STATE_BYTES >> 20} MiB at most "
            "are moved",
        )
    saved = os.pread(plan.memory, size, 0)
    # A stopped QEMU keeps its descriptor for a while yet (monitor_fdset_cleanup there), but nothing in it.
    os.ftruncate(plan.memory, 0)
    return _complete(saved, plan.machine)


async def close_plan(monitor: Monitor, plan: SavePlan) -> None:
    """Take back what QEMU was given, if it is still there."""
    os.close(plan.memory)
    with contextlib.suppress(FerryError):
        await monitor.execute("remove-fd", {"fdset-id": plan.fdset})


class LoadPlan(NamedTuple):
    """What an incoming QEMU told before there was a state for it."""

    machine: str
    arguments: dict[str, object]


async def ready_to_load(monitor: Monitor) -> LoadPlan:
    """Do all of a load that needs no state, and so costs no downtime. FerryError as in `load_state`."""
    if _member(await monitor.execute("query-status"), "status") != "inmigrate":
        raise FerryError(
            Reason.VMM_FAILED, f"QEMU at {monitor.path} does not wait for a state: start it with -incoming defer"
        )
    # In a QEMU that waits for its state, this takes away the wish to run as soon as it is.
    await monitor.execute("stop")
    await monitor.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": name, "state": True} for name in _ON]}
    )
    arguments: dict[str, object] = {"uri": f"fd:{_FD_NAME}"}
    if await _version(monitor) >= _RECEIVES_ERRORS:
        arguments["exit-on-error"] = False
    return LoadPlan(await machine_of(monitor), arguments)


async def load_state(monitor: Monitor, state: bytes, plan: LoadPlan, seconds: float) -> None:
    """Load a device state into a QEMU that was started with `-incoming defer`; the guest is paused afterwards.

    The load reads guest RAM, so faults must be served meanwhile. Disks are not locked before `cont`. FerryError:
    VMM_FAILED (the state is damaged, or of another machine, or QEMU does not take it), VMM_GONE (QEMU ended, as it does
    before 9.1 when it does not take a state), and what the monitor raises.
    """
    _check(state, plan.machine)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            await monitor.send_fd(_FD_NAME, theirs.fileno())
        ours.setblocking(False)
        writing = asyncio.create_task(_write(ours, state))
        try:
            await _receive(monitor, plan.arguments, seconds)
        finally:
            writing.cancel()
            await asyncio.wait([writing])


async def _give(monitor: Monitor, memory: int) -> int:
    # QEMU takes a descriptor from a set only for the same access as it asks for: writing alone.
    to_write = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        given = await monitor.execute_with_fd(to_write, "add-fd")
    finally:
        os.close(to_write)
    number = given.get("fdset-id") if isinstance(given, dict) else None
    if not isinstance(number, int):
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} takes a file descriptor and does not say where")
    return number


def _complete(saved: bytes, machine: str) -> bytes:
    if not saved.startswith(_HEAD):
        raise FerryError(
            Reason.VMM_FAILED, f"QEMU saved its state in a form that is not known: it begins with {saved[:8].hex()}"
        )
    name = machine.encode()
    body = _HEAD + _SECTION.pack(_CONFIGURATION, len(name)) + name + saved[len(_HEAD) :]
    return body + _tail(body)


def _tail(body: bytes) -> bytes:
    description = f'{{"sha256":"{hashlib.sha256(body).hexdigest()}"}}'.encode()
    return _SECTION.pack(_DESCRIPTION, len(description)) + description


def _check(state: bytes, machine: str) -> None:
    """Raise FerryError(VMM_FAILED) unless this is a whole state of such a machine.

    QEMU itself notices little of what damage does to a state, and may end on what it notices.
    """
    body = state[:-_TAIL_BYTES]
    if len(state) > MAX_STATE_BYTES + _MAX_NAME + _TAIL_BYTES or not body.startswith(_HEAD):
        raise FerryError(Reason.VMM_FAILED, f"{len(state)} bytes came that are no device state of a QEMU")
    if state[-_TAIL_BYTES:] != _tail(body):
        raise FerryError(Reason.VMM_FAILED, "the device state was damaged on its way: its digest differs")
    kind, length = _SECTION.unpack_from(body, len(_HEAD))
    start = len(_HEAD) + _SECTION.size
    name = body[start : start + length].decode(errors="replace")
    if kind != _CONFIGURATION or name != machine:
        raise FerryError(
            Reason.VMM_FAILED,
            f"the device state is of the machine {name[:_MAX_NAME]}, and this QEMU is {machine}: start it with the "
            "-machine of that name",
        )


async def _version(monitor: Monitor) -> tuple[int, int]:
    answer = await monitor.execute("query-version")
    try:
        return int(answer["qemu"]["major"]), int(answer["qemu"]["minor"])
    except (KeyError, TypeError, ValueError) as error:
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} does not tell its version") from error


async def _write(ours: socket.socket, state: bytes) -> None:
    """Write the state. Where QEMU does not read it to its end, its own verdict tells why."""
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(ours, state)
        ours.shutdown(socket.SHUT_WR)


async def _receive(monitor: Monitor, arguments: dict[str, object], seconds: float) -> None:
    """Have QEMU load what comes, and wait until it has."""
    try:
        with monitor.events("MIGRATION") as events:
            await monitor.execute("migrate-incoming", arguments)
            async with asyncio.timeout(seconds):
                status = await _outcome(monitor, events, seconds)
        if status == "completed":
            return
        why = _member(await monitor.execute("query-migrate"), "error-desc")
    except TimeoutError as error:
        raise FerryError(
            Reason.VMM_UNREACHABLE, f"QEMU at {monitor.path} has not loaded its state within {seconds:g} s"
        ) from error
    except FerryError as error:
        if not monitor.is_closed:
            raise
        raise FerryError(
            Reason.VMM_GONE, f"QEMU at {monitor.path} ended as it loaded its state; its standard error says why"
        ) from error
    raise FerryError(
        Reason.VMM_FAILED, f"QEMU at {monitor.path} does not take the state: {why or 'it does not say why'}"
    )


async def _outcome(monitor: Monitor, events: Events, seconds: float) -> str:
    while True:
        status = _member((await monitor.wait_event(events, seconds)).get("data"), "status")
        if status in ("completed", "failed"):
            return str(status)


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
