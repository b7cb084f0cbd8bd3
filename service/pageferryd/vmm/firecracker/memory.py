"""Where a microVM's memory lies: in guest-physical space, and in Firecracker's process.

Firecracker tells neither. The first follows from the memory's size (src/vmm/src/arch/*/layout.rs), the second from
/proc/PID/maps: guest memory is mapped region after region (src/vmm/src/vstate/memory.rs), and mappings of just these
sizes are looked for. The kernel joins neighbours of one kind into one mapping; then, and where sizes alone do not
decide, what Firecracker wrote into low memory at boot says which region is which.
"""

from __future__ import annotations

import itertools
import os
import platform
import struct
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.core.errors import LayoutError
from pageferryd.core.layout import Layout, Region
from pageferryd.linux.proc import mapping_lines
from pageferryd.vmm.driver import Memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Final

_GIB: Final = 1 << 30
_X86_HOLES: Final = (
    # PCI came with a larger hole below 4 GiB, and a second one.
    ((3 * _GIB, 4 * _GIB), (256 * _GIB, 512 * _GIB)),
    ((4 * _GIB - (768 << 20), 4 * _GIB),),
)
_ARM_START: Final = 2 * _GIB
_ARM_HOLES: Final = (((256 * _GIB, 512 * _GIB),), ())

_MOST_PLACES: Final = 64
# The ACPI root pointer, and the multiprocessor table of guests without ACPI: in an area that the guest is told to leave
# alone.
_BOOT_MARKS: Final = ((0xE0000, b"RSD PTR "), (0x9FC00, b"_MP_"))
_HUGETLB_NAME: Final = "/anon_hugepage"
_PAGEMAP_ENTRY: Final = struct.Struct("=Q")
_THERE: Final = 3 << 62

Ranges = tuple[tuple[int, int], ...]
"""Guest-physical ranges: (address, bytes)."""


@dataclass(frozen=True)
class _Mapped:
    """A private or shared mapping that can be read and written; `file` tells mapped files apart, and is empty for none.

    Bytes; `offset` is meaningful for a file alone.
    """

    start: int
    end: int
    offset: int
    file: str

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class _Place:
    """One way in which the memory may lie: its ranges, and where each begins in the process."""

    ranges: Ranges
    addresses: tuple[int, ...]
    joined: bool = False


def possible_ranges(size: int, machine: str) -> list[Ranges]:
    """Return the guest-physical ranges that a microVM of `size` bytes may have, by release of Firecracker."""
    start, kinds = (_ARM_START, _ARM_HOLES) if machine == "aarch64" else (0, _X86_HOLES)
    return list(dict.fromkeys(_cut(start, size, holes) for holes in kinds))


def _cut(start: int, size: int, holes: Iterable[tuple[int, int]]) -> Ranges:
    ranges = []
    for hole, end in holes:
        below = min(size, hole - start)
        ranges.append((start, below))
        size -= below
        if not size:
            return tuple(ranges)
        start = end
    return (*ranges, (start, size))


def find_memory(pid: int, size: int, page_size: int) -> Memory:
    """Find the memory of the microVM that process `pid` runs; sizes in bytes.

    FerryError: LAYOUT_INVALID where it is not found for certain, VMM_GONE, PERMISSION_MISSING.
    """
    mapped = _mapped(pid)
    places = list(
        itertools.islice(
            dict.fromkeys(
                place
                for ranges in possible_ranges(size, platform.machine())
                for place in itertools.chain(_apart(ranges, mapped), _joined(ranges, mapped))
            ),
            _MOST_PLACES + 1,
        )
    )
    if len(places) > 1 or any(place.joined for place in places):
        places = [place for place in places[:_MOST_PLACES] if _booted_at(pid, place.addresses[0])]
    if len(places) != 1:
        how = "at several places" if places else "nowhere"
        raise FerryError(
            Reason.LAYOUT_INVALID,
            f"the {size >> 20} MiB of guest memory are found {how} among the mappings of Firecracker (process {pid})",
        )
    return _memory(places[0], pid, page_size)


def _memory(place: _Place, pid: int, page_size: int) -> Memory:
    try:
        layout = Layout([Region(address, size, page_size) for address, size in place.ranges])
    except LayoutError as error:
        raise FerryError(Reason.LAYOUT_INVALID, f"the memory of Firecracker (process {pid}): {error}") from error
    locations = [
        memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=address)) for address in place.addresses
    ]
    return Memory(layout, locations, pid)


def _apart(ranges: Ranges, mapped: Sequence[_Mapped]) -> Iterator[_Place]:
    """Yield the ways in which each range has a mapping of its own."""
    sizes = [size for _, size in ranges]
    for fitting in _belonging_together(sizes, mapped):
        for chosen in itertools.product(*fitting):
            if len(set(chosen)) == len(chosen):
                yield _Place(ranges, tuple(one.start for one in chosen))


def _belonging_together(sizes: Sequence[int], mapped: Sequence[_Mapped]) -> Iterator[list[list[_Mapped]]]:
    """Yield which mappings each region may be: anonymous ones, or pieces of one file, memfd or snapshot, end to end."""
    pieces: dict[tuple[str, int, int], list[_Mapped]] = {}
    for one in mapped:
        pieces.setdefault((one.file, one.offset if one.file else 0, one.size), []).append(one)
    yield [pieces.get(("", 0, size), []) for size in sizes]
    starts = list(accumulate(sizes[:-1], initial=0))
    for file, offset, size in pieces:
        if file and (offset, size) == (0, sizes[0]):
            yield [pieces.get((file, start, length), []) for start, length in zip(starts, sizes, strict=True)]


def _joined(ranges: Ranges, mapped: Sequence[_Mapped]) -> Iterator[_Place]:
    """Yield the ways in which the kernel may have made one mapping of all ranges: upwards, or downwards."""
    sizes = [size for _, size in ranges]
    if len(sizes) == 1:
        return
    for one in mapped:
        if one.size != sum(sizes):
            continue
        if not one.file:
            yield _Place(ranges, tuple(one.end - end for end in accumulate(sizes)), joined=True)
        if not one.file or one.offset == 0:
            # Offsets in a file leave no doubt of which way.
            yield _Place(ranges, tuple(accumulate(sizes[:-1], initial=one.start)), joined=not one.file)


def _mapped(pid: int) -> list[_Mapped]:
    return [found for line in mapping_lines(pid) for found in _parse(line)]


def _parse(line: str) -> Iterator[_Mapped]:
    """Yield what a line of proc_pid_maps(5) says, if guest memory can be that."""
    addresses, permissions, offset, device, inode, *name = line.split(maxsplit=5)
    if permissions[:2] != "rw":
        return
    path = name[0] if name else ""
    start, _, end = addresses.partition("-")
    if inode == "0":
        if path and not path.startswith("[anon"):
            return
        file = ""
    else:
        # Anonymous huge pages come as files that nobody else has.
        file = "" if path.startswith(_HUGETLB_NAME) else f"{device} {inode}"
    yield _Mapped(int(start, 16), int(end, 16), int(offset, 16), file)


def _booted_at(pid: int, address: int) -> bool:
    """Say whether the lowest guest memory, if it begins at `address`, holds what Firecracker puts there at boot."""
    try:
        with (
            Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap,
            Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory,
        ):
            return any(
                _is_present(pagemap.fileno(), address + offset)
                and os.pread(memory.fileno(), len(mark), address + offset) == mark
                for offset, mark in _BOOT_MARKS
            )
    except (FileNotFoundError, ProcessLookupError) as error:
        raise FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) is gone") from error
    except PermissionError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING, f"/proc/{pid}/mem is not readable: run with CAP_SYS_PTRACE, or as the same user"
        ) from error
    except OSError:
        # Not mapped all through: no guest's lowest memory.
        return False


def _is_present(pagemap: int, address: int) -> bool:
    """Say whether a page is in memory or swap: one that is still to come must not be waited for."""
    entry = os.pread(pagemap, _PAGEMAP_ENTRY.size, address // os.sysconf("SC_PAGESIZE") * _PAGEMAP_ENTRY.size)
    return len(entry) == _PAGEMAP_ENTRY.size and bool(_PAGEMAP_ENTRY.unpack(entry)[0] & _THERE)
