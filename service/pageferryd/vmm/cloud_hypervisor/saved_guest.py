"""What Cloud Hypervisor says of a guest in its migration: where its memory lies, and all the rest as one blob."""

from __future__ import annotations

import json
import os
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from pageferry.abi import cloud_hypervisor as abi
from pageferry.errors import FerryError, Reason
from pageferryd.core.errors import LayoutError
from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.linux.memory_file import is_huge, is_memfd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_CONFIG_BYTES = 16 << 20
MAX_STATE_BYTES = 64 << 20
MAX_SLOTS = 512
"""Each slot costs a descriptor."""
_MAX_SAVED_BYTES = 78 << 20
"""What crosses in one message, with its framing."""
_MAX_OFFSET = (1 << 63) - 1
_HEADER = Struct("<8sHxxI")
"""magic, protocol version, bytes of the config; config and state follow."""
_MAGIC = b"pfchv001"


class Slot(NamedTuple):
    """A memory slot: a range of the guest's memory, and where that begins in the slot's memfd. In bytes."""

    number: int
    guest_address: int
    size: int
    file_offset: int

    @property
    def file_size(self) -> int:
        """How large its memfd must be."""
        return self.file_offset + self.size


class SavedGuest(NamedTuple):
    """Config and state of a stopped guest as its VMM sent them, and its memory slots by guest address."""

    version: int
    config: bytes
    state: bytes
    slots: Sequence[Slot]

    def pack(self) -> bytes:
        """Return all of it as bytes. FerryError(VMM_FAILED) where they are too many."""
        packed = _HEADER.pack(_MAGIC, self.version, len(self.config)) + self.config + self.state
        if len(packed) > _MAX_SAVED_BYTES:
            raise FerryError(
                Reason.VMM_FAILED, f"the guest's device state has {len(packed)} bytes: at most {_MAX_SAVED_BYTES} cross"
            )
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> SavedGuest:
        """Read what `pack` gave. FerryError: INVALID_ARGUMENT, PROTOCOL_MISMATCH, or as `read_slots`."""
        if len(packed) < _HEADER.size or not packed.startswith(_MAGIC):
            raise FerryError(Reason.INVALID_ARGUMENT, "this is not the state of a Cloud Hypervisor guest")
        _, version, length = _HEADER.unpack_from(packed)
        if version != abi.PROTOCOL_VERSION:
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                f"the guest's Cloud Hypervisor speaks version {version} of the migration protocol, and this sidecar "
                f"{abi.PROTOCOL_VERSION}: install the same release of pageferry on both hosts",
            )
        config, state = packed[_HEADER.size :][:length], packed[_HEADER.size + length :]
        if len(config) < length or not state:
            raise FerryError(Reason.INVALID_ARGUMENT, "the state of a Cloud Hypervisor guest was cut short")
        return cls(version, config, state, read_slots(config))

    @property
    def layout(self) -> Layout:
        """The guest's memory."""
        return Layout([Region(slot.guest_address, slot.size) for slot in self.slots])


def read_slots(config: bytes) -> list[Slot]:
    """Return the memory slots that a config names, by guest address.

    FerryError: VMM_FAILED where it is no config, LAYOUT_INVALID where its memory cannot be, GUEST_NOT_MOVABLE.
    """
    try:
        # Given the bytes, it would take other encodings too, which no VMM reads.
        read = json.loads(config.decode())
        mappings = read["memory_manager_data"]["guest_ram_mappings"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FerryError(
            Reason.VMM_FAILED, f"the VMM's migration config names no guest memory: {type(error).__name__}"
        ) from error
    if not isinstance(mappings, list) or not 0 < len(mappings) <= MAX_SLOTS:
        raise FerryError(
            Reason.LAYOUT_INVALID, f"the VMM's migration config has no list of 1 to {MAX_SLOTS} memory slots"
        )
    slots = sorted((_read_slot(one) for one in mappings), key=lambda slot: slot.guest_address)
    if len({slot.number for slot in slots}) < len(slots):
        raise FerryError(Reason.LAYOUT_INVALID, "the VMM's migration config has a memory slot twice")
    try:
        Layout([Region(slot.guest_address, slot.size) for slot in slots])
    except LayoutError as error:
        raise FerryError(Reason.LAYOUT_INVALID, f"the VMM's memory slots cannot be: {error}") from error
    return slots


def _read_slot(mapping: Any) -> Slot:
    if not isinstance(mapping, dict):
        raise FerryError(Reason.LAYOUT_INVALID, "a memory slot of the VMM's migration config is no object")
    if mapping.get("virtio_mem"):
        raise FerryError(
            Reason.GUEST_NOT_MOVABLE,
            "the guest has virtio-mem memory, which is not moved: start it without hotplug_method=virtio-mem",
        )
    slot = Slot(*(_number_in(mapping, name) for name in ("slot", "gpa", "size", "file_offset")))
    if slot.number >= 1 << 32 or slot.file_offset % PAGE_SIZE or slot.file_size > _MAX_OFFSET:
        raise FerryError(Reason.LAYOUT_INVALID, f"memory slot {slot.number} cannot be at {slot.file_offset:#x}")
    return slot


def _number_in(mapping: dict[str, Any], name: str) -> int:
    value = mapping.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_OFFSET:
        return value
    raise FerryError(Reason.LAYOUT_INVALID, f"a memory slot of the VMM's migration config has no usable {name}")


def for_receiver(config: bytes) -> bytes:
    """Return a config that `read_slots` has read, as a destination must get it: the memory comes on demand.

    Releases after v53 read that here alone, and would run a guest whose config does not say it on empty memory;
    v53 reads it in the call to its API, and passes over it here.
    """
    read = json.loads(config)
    if "memory_mode" in read:
        return json.dumps({**read, "memory_mode": "Postcopy"}).encode()
    # All else goes on byte for byte.
    return b'{"memory_mode":"Postcopy",' + config.lstrip()[1:]


def check_files(slots: Sequence[Slot], files: Mapping[int, int]) -> None:
    """Refuse descriptors that cannot be the slots' memfds. FerryError(VMM_FAILED), GUEST_NOT_MOVABLE."""
    wanted = {slot.number for slot in slots}
    if wanted != files.keys():
        missing, surplus = sorted(wanted - files.keys()), sorted(files.keys() - wanted)
        raise FerryError(
            Reason.VMM_FAILED,
            f"the VMM sent no memfd for memory slots {missing}, and memfds of slots {surplus} that its config lacks",
        )
    for slot in slots:
        fd = files[slot.number]
        if is_huge(fd):
            raise FerryError(
                Reason.GUEST_NOT_MOVABLE, "the guest's memory has huge pages: start it without hugepages=on"
            )
        found = os.fstat(fd).st_size
        if found < slot.file_size:
            raise FerryError(
                Reason.VMM_FAILED,
                f"the memfd of memory slot {slot.number} has {found} bytes, and the slot needs {slot.file_size}",
            )


def refuse_unless_memfd(slot: int, fd: int) -> None:
    """Refuse a descriptor that is no memfd. FerryError(VMM_FAILED)."""
    if not is_memfd(fd):
        raise FerryError(
            Reason.VMM_FAILED, f"the VMM's memory slot {slot} is no memfd: start it with --memory shared=on and no file"
        )
