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
_KEPT_NAME = "pageferry-state-way"
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
    """What a QEMU was given and told before its guest stood still: a file in memory, and that file's number there.

    `written` is the open file that QEMU has of it, whose position both share.
    """

    machine: str
    memory: int
    written: int
    fdset: int


async def ready_to_save(monitor: Monitor) -> SavePlan:
    """Do all of a save for which the guest need not stand; `close_plan` must follow. FerryError as in `save_state`."""
    if _SAVE not in await monitor.commands():
        raise FerryError(
            Reason.VMM_FAILED, f"QEMU at {monitor.path} does not know {_SAVE}; use one with all commands of migration"
        )
    machine = await machine_of(monitor)
    with contextlib.ExitStack() as undo:
        memory = os.memfd_create("pageferry-state", os.MFD_CLOEXEC)
        undo.callback(os.close, memory)
        # QEMU takes a descriptor from a set only for the same access as it asks for: writing alone.
        written = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
        undo.callback(os.close, written)
        plan = SavePlan(machine, memory, written, await _give(monitor, written))
        undo.pop_all()
    return plan


async def save_state(monitor: Monitor, plan: SavePlan) -> bytes:
    """Return the device state of a guest that stands, as `load_state` takes it, through memory: no disk is written.

    That it stands is the caller's to know. Its disks are let go, so that the destination can lock them; `cont` takes
    them back. FerryError: VMM_FAILED where QEMU cannot save, or the state is above MAX_STATE_BYTES, and what the
    monitor raises.
    """
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
    os.lseek(plan.written, 0, os.SEEK_SET)
    return _complete(saved, plan.machine)


async def close_plan(monitor: Monitor, plan: SavePlan) -> None:
    """Take back what QEMU was given, if it is still there."""
    os.close(plan.memory)
    os.close(plan.written)
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


async def await_state(monitor: Monitor, plan: LoadPlan) -> socket.socket:
    """Have QEMU wait for its one state at a socket, and return our end; before that comes QEMU looks at no memory.

    QEMU keeps our end as well, so that it waits on when this process ends; `forget_way` must follow once it has the
    state. FerryError as in `load_state`.
    """
    with contextlib.ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with theirs:
            await monitor.send_fd(_FD_NAME, theirs.fileno())
        await monitor.execute("migrate-incoming", plan.arguments)
        # Hung up on without a state, it would have failed, and before 9.1 end.
        await monitor.send_fd(_KEPT_NAME, ours.fileno())
        ours.setblocking(False)
        undo.pop_all()
    return ours


async def load_state(monitor: Monitor, state: bytes, plan: LoadPlan, connection: socket.socket, seconds: float) -> None:
    """Load a device state into a QEMU that waits at `connection` for it; the guest is paused afterwards.

    The load reads guest RAM, so faults must be served meanwhile. Disks are not locked before `cont`. What is no whole
    state of such a machine is refused before QEMU sees it. FerryError: VMM_FAILED (the state is damaged, or of another
    machine, or QEMU does not take it), VMM_GONE (QEMU ended, as it does before 9.1 when it does not take a state), and
    what the monitor raises.
    """
    _check(state, plan.machine)
    try:
        with monitor.events("MIGRATION") as events:
            async with asyncio.timeout(seconds):
                whole = await _write(connection, state)
                failed = not whole and await _has_failed(monitor)
                status = "failed" if failed else await _outcome(monitor, events, seconds)
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


async def forget_way(monitor: Monitor) -> None:
    """Have QEMU close its copy of our end of the way to its state, if it is still there."""
    with contextlib.suppress(FerryError):
        await monitor.execute("closefd", {"fdname": _KEPT_NAME})


async def _give(monitor: Monitor, file: int) -> int:
    given = await monitor.execute_with_fd(file, "add-fd")
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
    start = len(_HEAD) + _SECTION.size
    if len(body) < start:
        raise FerryError(Reason.VMM_FAILED, "a device state of a QEMU came that does not name its machine")
    kind, length = _SECTION.unpack_from(body, len(_HEAD))
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
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} does not tell its version") from error


async def _write(connection: socket.socket, state: bytes) -> bool:
    """Write the state; return whether QEMU has not hung up before its end, for which it has a reason of its own."""
    try:
        await asyncio.get_running_loop().sock_sendall(connection, state)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


async def _has_failed(monitor: Monitor) -> bool:
    """Say whether QEMU has given up, perhaps before anybody listened for that."""
    return bool(_member(await monitor.execute("query-migrate"), "status") == "failed")


async def _outcome(monitor: Monitor, events: Events, seconds: float) -> str:
    while True:
        status = _member((await monitor.wait_event(events, seconds)).get("data"), "status")
        if status in ("completed", "failed"):
            return str(status)


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
