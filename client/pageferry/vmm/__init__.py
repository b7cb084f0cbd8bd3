"""What a VMM's author needs to make its guests movable; docs/vmm-authors.md shows it in forty lines."""

from pageferry.vmm.handoff import HandoffRegion, PagerLink, send_handoff
from pageferry.vmm.memory import Backing, GuestMemory
from pageferry.vmm.regions import (
    FileMemory,
    MemfdMemory,
    MemoryDescription,
    ProcessMemory,
    Region,
    VmmState,
)
from pageferry.vmm.service import Vmm, VmmServer

__all__ = [
    "Backing",
    "FileMemory",
    "GuestMemory",
    "HandoffRegion",
    "MemfdMemory",
    "MemoryDescription",
    "PagerLink",
    "ProcessMemory",
    "Region",
    "Vmm",
    "VmmServer",
    "VmmState",
    "send_handoff",
]
