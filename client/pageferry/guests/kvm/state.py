"""The device state of the guest: the registers of its vCPU, packed for the journey.

Little endian: magic, size of the guest's memory, struct kvm_regs, struct kvm_sregs, and a CRC-32 of all before it. The
guest uses no floating point, no MSR and no interrupt, so nothing else of the vCPU differs from a fresh one.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.guests.kvm.layout import Layout
from pageferry.guests.kvm.program import Work

_MAGIC: Final = b"PFKVM\x00\x00\x01"
_HEADER: Final = struct.Struct("<8sQ")
_CRC: Final = struct.Struct("<I")
_REGS_END: Final = _HEADER.size + ctypes.sizeof(abi.Regs)
_SREGS_END: Final = _REGS_END + ctypes.sizeof(abi.Sregs)
STATE_BYTES: Final = _SREGS_END + _CRC.size


@dataclass(frozen=True)
class State:
    """The registers of a stopped guest with `memory_size` bytes of memory."""

    memory_size: int
    regs: abi.Regs
    sregs: abi.Sregs

    def pack(self) -> bytes:
        """Return the state as bytes."""
        body = _HEADER.pack(_MAGIC, self.memory_size) + bytes(self.regs) + bytes(self.sregs)
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes, layout: Layout) -> State:
        """Read a state, and refuse one that no guest of this program with the memory of `layout` can have."""
        if len(data) != STATE_BYTES:
            raise _refusal(f"it has {len(data)} bytes, not {STATE_BYTES}")
        magic, memory_size = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise _refusal(f"it begins with {magic!r}, not with {_MAGIC!r}: another VMM or version saved it")
        if _CRC.unpack_from(data, _SREGS_END)[0] != zlib.crc32(data[:_SREGS_END]):
            raise _refusal("its checksum is wrong")
        if memory_size != layout.size:
            raise FerryError(
                Reason.LAYOUT_MISMATCH,
                f"the state is of a guest with {memory_size} bytes of memory and this VMM has {layout.size}: start it "
                "with the same --memory",
            )
        regs = abi.Regs.from_buffer_copy(data, _HEADER.size)
        work = Work.from_registers(regs).checked()
        if (work.pages, work.data_address) != (layout.data_pages, layout.data_address):
            raise _refusal(f"its program works on {work.pages} pages at {work.data_address:#x}, where none may be")
        return cls(memory_size, regs, abi.Sregs.from_buffer_copy(data, _REGS_END))


def _refusal(why: str) -> FerryError:
    return FerryError(Reason.INVALID_ARGUMENT, f"this is no state of a KVM guest that can be loaded here: {why}")
