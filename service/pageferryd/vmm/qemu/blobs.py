"""Small RAM blocks of a QEMU that cross with its state: packed before the guest stands, written where they differ."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.vmm.qemu.package import (
    MAX_BLOB_BYTES,
    MAX_BLOBS,
    Blob,
    digest_of,
    pack_blob,
    unpack_blob,
    without_zeroes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pageferryd.vmm.qemu.blocks import FoundBlocks, RamBlock

_log = structlog.get_logger(__name__)

# Blobs that QEMU makes of its own command line (hw/core/loader.c, rom_set_mr there), and option ROMs that it reads from
# files. Before QEMU 10 nothing tells their addresses, so one end may locate what the other does not.
_BLOB = "/rom@"
_OPTION_ROM = ".rom"


def is_blob(name: str) -> bool:
    """Say whether a RAM block is a blob of firmware, which crosses with the state."""
    return name.startswith((_BLOB, _BLOB[1:])) or name.endswith(_OPTION_ROM)


@dataclass
class _Leaving:
    """A blob at its source: what it was, and room to read what it has become."""

    block: RamBlock
    seen: bytearray
    now: bytearray
    packed: Blob


class LeavingBlobs:
    """The blobs of a guest that is about to stop, packed already. FerryError(VMM_GONE) from every method."""

    def __init__(self, pid: int, found: FoundBlocks) -> None:
        """Read and pack them; some ms."""
        self._pid = pid
        self._all: list[_Leaving] = []
        blocks = [block for block in found.located if is_blob(block.name) and block.size <= MAX_BLOB_BYTES]
        with _Memory(pid, os.O_RDONLY) as memory:
            for block in blocks[:MAX_BLOBS]:
                seen = bytearray(block.size)
                memory.read(block, seen)
                # The copy has its pages in place: to fill it again costs no page faults.
                self._all.append(_Leaving(block, seen, bytearray(seen), pack_blob(seen)))
        self.size = sum(one.block.size for one in self._all)
        """In bytes."""

    def as_they_are(self) -> dict[str, Blob]:
        """Return them as they are now; only what has changed, rare as it is, is packed again."""
        with _Memory(self._pid, os.O_RDONLY) as memory:
            for one in self._all:
                memory.read(one.block, one.now)
                if one.now != one.seen:
                    one.seen, one.now = one.now, one.seen
                    one.packed = pack_blob(one.seen)
        return {one.block.name: one.packed for one in self._all}


class WaitingBlobs:
    """The blobs that a waiting QEMU has made itself, which nobody changes while it waits."""

    def __init__(self, pid: int, found: FoundBlocks) -> None:
        """Read them. FerryError(VMM_GONE)."""
        self._pid = pid
        self._blocks = {block.name: block for block in found.located if is_blob(block.name)}
        self.size = sum(block.size for block in self._blocks.values())
        """In bytes."""
        self._filled: dict[str, bytes] = {}
        self._digests: dict[str, bytes] = {}
        with _Memory(pid, os.O_RDONLY) as memory:
            for name, block in self._blocks.items():
                content = bytearray(block.size)
                memory.read(block, content)
                self._keep(name, without_zeroes(content))

    def become(self, blobs: Mapping[str, Blob]) -> None:
        """Make them those of the source. FerryError: VMM_GONE, VMM_MISMATCH, VMM_FAILED (damaged)."""
        with _Memory(self._pid, os.O_RDWR) as memory:
            for name, blob in blobs.items():
                block = self._blocks.get(name)
                if block is None:
                    # This QEMU has made or read the same; a reboot of the guest makes tables anew.
                    _log.info("qemu_block_not_located", pid=self._pid, block=name)
                    continue
                if block.size != blob.length:
                    raise FerryError(
                        Reason.VMM_MISMATCH,
                        f"RAM block {name} has {blob.length} bytes at the source, {block.size} here: start QEMU with "
                        "the same devices and firmware",
                    )
                if blob.digest != self._digests[name]:
                    filled = unpack_blob(name, blob)
                    _write_changes(memory, block, self._filled[name], filled)
                    self._keep(name, filled)

    def _keep(self, name: str, filled: bytes) -> None:
        self._filled[name] = filled
        self._digests[name] = digest_of(filled)


def _write_changes(memory: _Memory, block: RamBlock, before: bytes, after: bytes) -> None:
    """Write the pages that differ; both end where zeroes begin."""
    size = max(len(before), len(after))
    before, after = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    for at in range(0, size, PAGE_SIZE):
        page = after[at : at + PAGE_SIZE]
        if page != before[at : at + PAGE_SIZE]:
            memory.write(block.host_address + at, page)


class _Memory:
    """The memory of a process; a context manager. FerryError(VMM_GONE) where it cannot be reached."""

    def __init__(self, pid: int, access: int) -> None:
        self._pid = pid
        try:
            self._fd = os.open(Path(f"/proc/{pid}/mem"), access | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreachable(error.strerror) from error

    def read(self, block: RamBlock, into: bytearray) -> None:
        try:
            done = os.preadv(self._fd, [into], block.host_address)
        except OSError as error:
            raise self._unreachable(error.strerror) from error
        if done != len(into):
            raise self._unreachable(f"{done} of {len(into)} bytes of {block.name} can be read")

    def write(self, address: int, data: bytes) -> None:
        try:
            done = os.pwrite(self._fd, data, address)
        except OSError as error:
            raise self._unreachable(error.strerror) from error
        if done != len(data):
            raise self._unreachable(f"{done} of {len(data)} bytes at {address:#x} can be written")

    def _unreachable(self, why: str | None) -> FerryError:
        return FerryError(Reason.VMM_GONE, f"the memory of QEMU (process {self._pid}) cannot be reached: {why}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
