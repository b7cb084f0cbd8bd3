"""A QEMU's RAM blocks as a guest's memory: which are filled page by page, and which cross with the state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.core.errors import LayoutError
from pageferryd.core.layout import Layout, Region
from pageferryd.linux.mapped_files import files_behind
from pageferryd.vmm.qemu.package import MAX_BLOB_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pageferryd.vmm.qemu.blocks import FoundBlocks, RamBlock

_log = structlog.get_logger(__name__)

# Blobs that QEMU makes of its own command line (hw/core/loader.c, rom_set_mr there), and option ROMs that it reads from
# files. Before QEMU 10 nothing tells their addresses, so one end may locate what the other does not.
_BLOB = "/rom@"
_OPTION_ROM = ".rom"


def is_blob(name: str) -> bool:
    """Say whether a RAM block is a blob of firmware, which crosses with the state."""
    return name.startswith((_BLOB, _BLOB[1:])) or name.endswith(_OPTION_ROM)


def paged(found: FoundBlocks) -> list[RamBlock]:
    """Return the blocks that are filled page by page. FerryError(LAYOUT_INVALID) where one could not be located."""
    for missing in found.missing:
        if not is_blob(missing.name):
            raise FerryError(Reason.LAYOUT_INVALID, missing.reason)
    return [block for block in found.located if not is_blob(block.name)]


def layout_of(blocks: Sequence[RamBlock]) -> Layout:
    """Return their layout; the place of a block in QEMU's ram_addr space stands for its guest address."""
    try:
        return Layout([Region(block.offset, block.size, block.page_size) for block in blocks])
    except LayoutError as error:
        raise FerryError(Reason.LAYOUT_INVALID, f"QEMU's RAM blocks are no memory of a guest: {error}") from error


def locations_of(pid: int, blocks: Sequence[RamBlock]) -> list[memory_pb2.MemoryLocation]:
    """Return where each block can be read: through its file where it is shared, for then holes can be told."""
    locations = []
    for block in blocks:
        pieces = files_behind(pid, block.host_address, block.size) if block.is_shared else []
        if len(pieces) == 1 and os.access(pieces[0].path, os.R_OK):
            file = memory_pb2.FileMemory(path=pieces[0].path, offset=pieces[0].offset)
            locations.append(memory_pb2.MemoryLocation(file=file))
        else:
            process = memory_pb2.ProcessMemory(address=block.host_address)
            locations.append(memory_pb2.MemoryLocation(process=process))
    return locations


def read_blobs(pid: int, found: FoundBlocks) -> dict[str, bytes]:
    """Return the content of the blobs. FerryError(VMM_GONE)."""
    blobs: dict[str, bytes] = {}
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for block in found.located:
                if is_blob(block.name) and block.size <= MAX_BLOB_BYTES:
                    blobs[block.name] = os.pread(memory.fileno(), block.size, block.host_address)
    except OSError as error:
        raise _unreachable(pid, error) from error
    return blobs


def write_blobs(pid: int, found: FoundBlocks, blobs: Mapping[str, bytes]) -> None:
    """Make the blobs of a waiting QEMU those of the source. FerryError: VMM_GONE, VMM_MISMATCH."""
    here = {block.name: block for block in found.located if is_blob(block.name)}
    try:
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            for name, content in blobs.items():
                block = here.get(name)
                if block is None:
                    # This QEMU has made or read the same; a reboot of the guest makes tables anew.
                    _log.info("qemu_block_not_located", pid=pid, block=name)
                    continue
                if block.size != len(content):
                    raise FerryError(
                        Reason.VMM_MISMATCH,
                        f"RAM block {name} has {len(content)} bytes at the source, {block.size} here: start QEMU with "
                        "the same devices and firmware",
                    )
                if os.pread(memory.fileno(), block.size, block.host_address) != content:
                    os.pwrite(memory.fileno(), content, block.host_address)
    except OSError as error:
        raise _unreachable(pid, error) from error


def _unreachable(pid: int, error: OSError) -> FerryError:
    return FerryError(Reason.VMM_GONE, f"the memory of QEMU (process {pid}) cannot be reached: {error.strerror}")
