"""A QEMU's RAM blocks as a guest's memory: which are filled page by page, and which cross with the state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import memory_pb2
from pageferryd.core.errors import LayoutError
from pageferryd.core.layout import Layout, Region
from pageferryd.linux.mapped_files import files_behind
from pageferryd.vmm.qemu.blobs import is_blob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferryd.vmm.qemu.blocks import FoundBlocks, RamBlock


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
