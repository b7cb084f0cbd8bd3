"""What keeps a guest of QEMU from being moved by a pager outside it."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.linux.proc import open_files
from pageferryd.vmm.qemu.blocks import list_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pageferryd.vmm.qemu.blocks import RamBlock
    from pageferryd.vmm.qemu.monitor import Monitor

_TARGETS = ("x86_64", "i386")
_HUGEST = 1 << 30
# MigrationStatus in qapi/migration.json there: all but these are a migration on its way.
_AT_REST = frozenset({"none", "completed", "failed", "cancelled"})
_DEVICE = re.compile(r"^[ \t]*dev: ((?:vhost-user-|vhost-vdpa-|vfio-user-)[^,\s]+), id \"(.*)\"", re.MULTILINE)
_NETWORK = re.compile(r"^[ \t]*(?:\\ )?(\S+): .*\btype=(vhost-user|vhost-vdpa)\b", re.MULTILINE)
_HARDWARE = re.compile(r"/dev/vfio/.*|/dev/iommu|/dev/vhost-vdpa.*|anon_inode:\[vfio-device\]")


async def obstacles(monitor: Monitor, pid: int) -> list[str]:
    """Return a sentence for each thing that keeps the guest of process `pid` from being moved; best there are none.

    FerryError: what the monitor and /proc raise.
    """
    found = [f"QEMU says: {reason}" for reason in await _blocked(monitor)]
    found += await _target(monitor)
    found += passed_through((await asyncio.to_thread(open_files, pid)).values())
    found += await _other_mappers(monitor)
    found += [
        f"RAM block {block.name} is in pages of 1 GiB, which cannot be filled by parts: use pages of 2 MiB or 4 KiB"
        for block in await list_blocks(monitor)
        if block.page_size >= _HUGEST
    ]
    return found


async def busy(monitor: Monitor) -> str | None:
    """Return what QEMU is doing that must end first, as a sentence; None where nothing is."""
    status = (await _migration(monitor)).get("status", "none")
    if status in _AT_REST:
        return None
    return f"QEMU at {monitor.path} is in a migration of its own ({status}): wait for its end, or cancel it"


def unfillable(blocks: Sequence[RamBlock]) -> list[str]:
    """Return a sentence for each block of an incoming QEMU whose pages cannot be kept back and filled in."""
    return [
        f"RAM block {block.name} is a private view of a file, whose pages it would show instead of the guest's: say "
        "share=on"
        for block in blocks
        if not block.is_shared and not block.is_anonymous
    ]


async def _migration(monitor: Monitor) -> dict[str, object]:
    answer = await monitor.execute("query-migrate")
    if not isinstance(answer, dict) or not isinstance(answer.get("status", ""), str):
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} does not tell of its migrations")
    return answer


async def _blocked(monitor: Monitor) -> list[str]:
    reasons = (await _migration(monitor)).get("blocked-reasons", [])
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} does not tell what blocks a migration")
    return reasons


async def _target(monitor: Monitor) -> list[str]:
    answer = await monitor.execute("query-target")
    arch = answer.get("arch") if isinstance(answer, dict) else None
    if arch in _TARGETS:
        return []
    if not isinstance(arch, str):
        raise FerryError(Reason.VMM_FAILED, f"QEMU at {monitor.path} does not tell its guest's architecture")
    return [f"the guest is of the architecture {arch}: only {' and '.join(_TARGETS)} are moved"]


def passed_through(opened: Iterable[str]) -> list[str]:
    """Return a sentence where QEMU has opened hardware for its guest, which uses memory without causing page faults."""
    held = sorted({name for name in opened if _HARDWARE.fullmatch(name)})
    return [f"QEMU passes hardware through to the guest ({', '.join(held)}): unplug it"] if held else []


async def _other_mappers(monitor: Monitor) -> list[str]:
    """A device in another process maps guest memory there, where a userfaultfd of QEMU's does not reach."""
    devices = [f"{kind} {name}".rstrip() for kind, name in _DEVICE.findall(await monitor.hmp("info qtree"))]
    networks = [f"{kind} {name}" for name, kind in _NETWORK.findall(await monitor.hmp("info network"))]
    return [
        f"{what} serves the guest from outside QEMU, where its page faults are not seen: unplug it"
        for what in [*devices, *networks]
    ]
