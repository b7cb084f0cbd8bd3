"""Private pages of a guest, as its VMM tells of them and exports them at the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pageferry.errors import FerryError, Reason
from pageferry.v1 import vmm_pb2

MAX_RANGES = 1_000_000
MAX_EXPORTED = 512
"""Most pages that are asked for at once, or are in one bundle."""
MAX_PAYLOAD_BYTES = 4 << 20
MAX_METADATA_BYTES = 1 << 20


@dataclass(frozen=True)
class PrivatePages:
    """Which ranges are private to the guest, each as guest address and size in bytes.

    `opaque` where nobody but the VMM can read them: it is asked to export them.
    """

    ranges: Sequence[tuple[int, int]] = ()
    opaque: bool = False

    def to_wire(self) -> vmm_pb2.ListPrivatePagesResponse:
        """Return them as a message. FerryError where they are too many."""
        if len(self.ranges) > MAX_RANGES:
            raise FerryError(
                Reason.VMM_FAILED, f"the VMM has {len(self.ranges)} ranges of private pages; at most {MAX_RANGES} go"
            )
        return vmm_pb2.ListPrivatePagesResponse(
            guest_addresses=[address for address, _ in self.ranges],
            sizes=[size for _, size in self.ranges],
            opaque=self.opaque,
        )


@dataclass(frozen=True)
class PageBundle:
    """Opaque pages that are exported, and imported, as one; pageferry looks into neither payload nor metadata.

    `payload` is empty where the pages are only pending. Within a stream the order of bundles is kept until the guest
    runs at its destination.
    """

    guest_addresses: Sequence[int]
    payload: bytes = b""
    metadata: bytes = b""
    stream: int = 0
    epoch: int = 0

    def to_wire(self) -> vmm_pb2.GuestPageBundle:
        """Return it as a message. FerryError where it is larger than any may be."""
        found = len(self.guest_addresses), len(self.payload), len(self.metadata)
        if any(size > most for size, most in zip(found, _MOST, strict=True)):
            raise FerryError(
                Reason.VMM_FAILED,
                f"the VMM exported a bundle of (pages, payload, metadata) {found}; at most {_MOST} can be moved",
            )
        return vmm_pb2.GuestPageBundle(
            guest_addresses=self.guest_addresses,
            payload=self.payload,
            metadata=self.metadata,
            stream=self.stream,
            epoch=self.epoch,
        )


_MOST = MAX_EXPORTED, MAX_PAYLOAD_BYTES, MAX_METADATA_BYTES
