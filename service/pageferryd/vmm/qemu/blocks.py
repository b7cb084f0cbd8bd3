"""The RAM blocks of a QEMU, and where each lies in its address space.

`info ramblock` lists them (ram_block_format in system/physmem.c there); from QEMU 10 on with their addresses. Before,
`gpa2hva` tells the address of what the guest sees at a guest-physical one, and `info mtree -f` what it sees where. The
few that it does not see now (blobs of firmware tables, a display's memory before its BIOS ran) are known by their size.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.qemu.mapped import Mapped, like_ram, mapped, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferryd.vmm.qemu.monitor import Monitor

_MAX_BLOCKS = 4096
# The expressions below look at a row again from each of its blanks: QEMU's rows have some hundred characters.
_MAX_ROW = 2000
_MAX_RANGES = 4096
_LOOK_SECONDS = 20.0
"""How long all questions about the guest's memory may take together: there are two a range."""
_SPACE = 1 << 64
_SMALLEST_PAGE = 4096
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ROW = re.compile(r"\s*(\S.*?)\s+([\d.]+) ([KMGT]?i?B)((?:\s+\S+)+)\s*")
_RANGE = re.compile(
    r"\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:nv-)?(?:ram|rom|ramd|romd)\): [^@]*(?:@([0-9a-f]+))?"
)
_HOST = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((.*)\) is 0x([0-9a-f]+)")


@dataclass(frozen=True)
class ListedBlock:
    """One row of `info ramblock`; `host_address` is None where this QEMU does not tell it."""

    name: str
    offset: int
    size: int
    page_size: int
    host_address: int | None


@dataclass(frozen=True)
class RamBlock:
    """One block of QEMU's RAM: `size` bytes at `offset` of its ram_addr space, at `host_address` in its process.

    `size` is what is mapped, in whole pages; the guest may use less. `page_size` is above 4096 for hugetlbfs. Memory
    that is neither shared nor anonymous is a private view of a file, whose pages come back when it is emptied.
    """

    name: str
    offset: int
    size: int
    page_size: int
    host_address: int
    is_shared: bool
    is_anonymous: bool


class MissingBlock(NamedTuple):
    """A block that was not found, and why not, as a sentence."""

    name: str
    size: int
    reason: str


class FoundBlocks(NamedTuple):
    """The blocks in QEMU's order, and those that could not be located."""

    located: list[RamBlock]
    missing: list[MissingBlock]


def parse_ramblocks(text: str) -> list[ListedBlock]:
    """Read what `info ramblock` prints. FerryError(VMM_FAILED) where that is not what QEMU prints."""
    head, *rows = text.splitlines() or [""]
    columns = head.split()
    if columns[:5] != ["Block", "Name", "PSize", "Offset", "Used"] or "Total" not in columns or len(rows) > _MAX_BLOCKS:
        raise FerryError(Reason.VMM_FAILED, f"QEMU lists its RAM blocks in a way that is not known: {head[:200]}")
    blocks = [_block(row, columns[3:]) for row in rows if row.strip()]
    if not blocks or len({block.name for block in blocks}) < len(blocks):
        raise FerryError(Reason.VMM_FAILED, "QEMU lists no RAM blocks, or one twice")
    return blocks


async def list_blocks(monitor: Monitor) -> list[ListedBlock]:
    """Return the rows of `info ramblock`."""
    return parse_ramblocks(await monitor.hmp("info ramblock"))


async def find_blocks(monitor: Monitor, pid: int) -> FoundBlocks:
    """Locate the RAM blocks of process `pid`, whose monitor this is.

    FerryError: VMM_FAILED where QEMU contradicts itself or the kernel, and what the monitor and /proc raise.
    """
    blocks = await list_blocks(monitor)
    told = {block.name: block.host_address for block in blocks if block.host_address is not None}
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            seen = told or await _seen_by_guest(monitor, blocks)
    except TimeoutError as error:
        raise FerryError(
            Reason.VMM_UNREACHABLE,
            f"QEMU at {monitor.path} has not told where its guest's memory is within {_LOOK_SECONDS:g} s",
        ) from error
    # Beside the loop: a QEMU may have very many mappings, and other guests' faults are served meanwhile.
    return await asyncio.to_thread(lambda: _locate(blocks, seen, mapped(pid)))


def _locate(blocks: Sequence[ListedBlock], seen: dict[str, int], mappings: list[Mapped]) -> FoundBlocks:
    located, missing = [], []
    free = [one for one in like_ram(mappings) if one.start not in seen.values()]
    unseen_of_size = Counter(block.size for block in blocks if block.name not in seen)
    for block in blocks:
        address = seen.get(block.name)
        if address is None:
            fitting = [one for one in free if one.size == block.size]
            if len(fitting) != 1 or unseen_of_size[block.size] != 1:
                missing.append(MissingBlock(block.name, block.size, _why_missing(block, fitting, unseen_of_size)))
                continue
            address = fitting[0].start
        backing = whole(mappings, address, block.size)
        if backing is None:
            raise FerryError(
                Reason.VMM_FAILED,
                f"QEMU says that its RAM block {block.name} is at {address:#x}, where no {block.size} bytes are mapped",
            )
        located.append(
            RamBlock(
                block.name,
                block.offset,
                block.size,
                block.page_size,
                address,
                backing.is_shared,
                backing.is_anonymous,
            )
        )
    return FoundBlocks(located, missing)


def _why_missing(block: ListedBlock, fitting: list[Mapped], unseen_of_size: Counter[int]) -> str:
    alike = unseen_of_size[block.size]
    return (
        f"RAM block {block.name} cannot be located: this QEMU tells no addresses, the guest does not see it now, and "
        f"there are {alike} such blocks and {len(fitting)} mappings of {block.size} bytes"
    )


async def _seen_by_guest(monitor: Monitor, blocks: Sequence[ListedBlock]) -> dict[str, int]:
    """Return the addresses of the blocks that are in guest-physical space, by name."""
    bases: dict[str, set[int]] = {}
    for first, last, offset in _ranges(await monitor.hmp("info mtree -f")):
        start, end = await _host(monitor, first), await _host(monitor, last)
        # A range that the guest has moved meanwhile (a PCI BAR) tells nothing.
        if start is not None and end == (start[0], start[1] + last - first):
            bases.setdefault(start[0], set()).add(start[1] - offset)
    found: dict[str, int] = {}
    for region, addresses in bases.items():
        # A block is called like its memory region, with its device's name before that.
        named = [block.name for block in blocks if block.name == region or block.name.endswith(f"/{region}")]
        # Regions of several devices may have one name; parts of one region agree on where it begins.
        if len(named) == len(addresses) == 1:
            found[named[0]] = addresses.pop()
    return found


async def _host(monitor: Monitor, address: int) -> tuple[str, int] | None:
    """Return which memory region is at a guest-physical address, and that byte's address in QEMU."""
    answer = _HOST.match(await monitor.hmp(f"gpa2hva {address:#x}"))
    return (answer[1], int(answer[2], 16)) if answer else None


def _ranges(text: str) -> list[tuple[int, int, int]]:
    """Return first and last guest-physical address of each range of memory, and its offset in its region."""
    ranges: list[tuple[int, int, int]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("FlatView"):
            inside = False
        elif line.startswith(' AS "memory", root: system'):
            inside = True
        elif inside and (row := _RANGE.match(line)):
            ranges.append((int(row[1], 16), int(row[2], 16), int(row[3] or "0", 16)))
    if not ranges or len(ranges) > _MAX_RANGES:
        raise FerryError(Reason.VMM_FAILED, f"QEMU shows {len(ranges)} ranges of guest memory, which cannot be")
    return ranges


def _block(row: str, columns: Sequence[str]) -> ListedBlock:
    parts = _ROW.fullmatch(row) if len(row) <= _MAX_ROW else None
    if parts and parts[3] in _UNITS:
        values = dict(zip(columns, parts[4].split(), strict=False))
        try:
            offset, size = _number(values["Offset"]), _number(values["Total"])
            address = _number(values["HVA"]) if "HVA" in columns else None
            page_size = float(parts[2]) * _UNITS[parts[3]]
        except (KeyError, ValueError):
            pass
        else:
            if size > 0 and page_size >= _SMALLEST_PAGE and size % page_size == 0 and offset % page_size == 0:
                return ListedBlock(parts[1], offset, size, int(page_size), address)
    raise FerryError(Reason.VMM_FAILED, f"QEMU lists a RAM block that cannot be: {row[:200]}")


def _number(text: str) -> int:
    number = int(text, 16)
    if not 0 <= number < _SPACE:
        raise ValueError(text)
    return number
