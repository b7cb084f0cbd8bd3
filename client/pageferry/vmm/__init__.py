"""What a VMM's author needs to make its guests movable; docs/vmm-authors.md shows it in forty lines."""

from pageferry.vmm.bitmap import UserfaultBitmap
from pageferry.vmm.faults import (
    Access,
    FaultEndpoint,
    FaultForwarder,
    Import,
    ImportResult,
    Outcome,
    Resolution,
)
from pageferry.vmm.guest_memfd import GuestMemfd
from pageferry.vmm.handoff import HandoffRegion, PagerLink, send_handoff
from pageferry.vmm.memory import Backing, GuestMemory
from pageferry.vmm.private_pages import PageBundle, PrivatePages
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
    "Access",
    "Backing",
    "FaultEndpoint",
    "FaultForwarder",
    "FileMemory",
    "GuestMemfd",
    "GuestMemory",
    "HandoffRegion",
    "Import",
    "ImportResult",
    "MemfdMemory",
    "MemoryDescription",
    "Outcome",
    "PageBundle",
    "PagerLink",
    "PrivatePages",
    "ProcessMemory",
    "Region",
    "Resolution",
    "UserfaultBitmap",
    "Vmm",
    "VmmServer",
    "VmmState",
    "send_handoff",
]
