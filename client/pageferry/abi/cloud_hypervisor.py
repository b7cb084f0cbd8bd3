"""The live migration protocol of Cloud Hypervisor: constants and struct formats (vm-migration/src/protocol.rs there).

Little endian. Every request is answered by a response before the next one is sent.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

REQUEST: Final = Struct("<H6sQ")
"""command, headers (of START: the protocol version as u16, then zeroes), payload length in bytes."""
RESPONSE: Final = Struct("<H6xQ")
"""status, payload length in bytes."""
VERSION: Final = Struct("<H4x")
"""What the headers of START hold."""
SLOT: Final = Struct("<I")
"""Payload of MEMORY_FD: the memory slot, sent with the slot's memfd as SCM_RIGHTS."""
RANGE: Final = Struct("<QQ")
"""Payload of PAGE_FAULT: guest address and length, in bytes."""
ROLE: Final = Struct("<H")
"""What a further connection begins with."""

PROTOCOL_VERSION: Final = 0
ROLE_FAULT: Final = 2
"""The connection carries PAGE_FAULT requests, from the VMM to its peer."""
STATUS_OK: Final = 1
STATUS_ERROR: Final = 2


class Command(IntEnum):
    """Commands of requests."""

    START = 1
    CONFIG = 2
    STATE = 3
    MEMORY = 4
    COMPLETE = 5
    """The end; the guest ran when the migration began, and is to run at its destination."""
    ABANDON = 6
    MEMORY_FD = 7
    COMPLETE_PAUSED = 8
    """The end; the guest was paused when the migration began, and stays so."""
    PAGE_FAULT = 9


NO_HEADERS: Final = bytes(6)
