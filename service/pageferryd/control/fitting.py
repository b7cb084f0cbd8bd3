"""Whether a guest can leave here, and whether the VMM that waits can take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.vmm.driver import Activity

if TYPE_CHECKING:
    from pageferry.v1 import incoming_pb2
    from pageferryd.control.registry import Guest
    from pageferryd.core.layout import Layout
    from pageferryd.vmm.driver import Description


def memory_bytes(description: Description) -> int:
    """Return the size of a guest's memory, 0 where its VMM cannot tell yet."""
    layout = description.layout
    return layout.page_count * PAGE_SIZE if layout is not None else description.memory_bytes


def refuse_immovable(guest: Guest, description: Description) -> None:
    """Raise FerryError unless the guest can leave now: GUEST_NOT_RUNNING, GUEST_NOT_MOVABLE."""
    if description.activity is not Activity.RUNNING:
        raise FerryError(
            Reason.GUEST_NOT_RUNNING,
            f"guest {guest.guest_id} is {description.activity.value}: only a running guest can be moved",
        )
    if description.obstacles:
        raise FerryError(
            Reason.GUEST_NOT_MOVABLE, f"guest {guest.guest_id} cannot be moved: {'; '.join(description.obstacles)}"
        )


def refuse_unfit(
    guest: Guest, description: Description, request: incoming_pb2.PrepareRequest, theirs: Layout | None
) -> None:
    """Raise FerryError unless the VMM here can take the source's guest, whose memory is `theirs` where that is known.

    GUEST_NOT_INCOMING, VMM_MISMATCH, LAYOUT_MISMATCH.
    """
    if description.activity is not Activity.INCOMING:
        raise FerryError(
            Reason.GUEST_NOT_INCOMING,
            f"the VMM of guest {guest.guest_id} is {description.activity.value}: start one that waits for a guest",
        )
    if request.driver != guest.driver_name:
        raise FerryError(
            Reason.VMM_MISMATCH,
            f"guest {guest.guest_id} runs in a VMM of kind {request.driver!r} at the source, and {guest.driver_name!r} "
            "waits for it here: start the same kind of VMM",
        )
    if request.machine and description.machine and request.machine != description.machine:
        raise FerryError(
            Reason.VMM_MISMATCH,
            f"guest {guest.guest_id} is a {request.machine} at the source, and a {description.machine} waits for it "
            "here: start the VMM with the same machine type",
        )
    ours = description.layout
    if ours is not None and theirs is not None and not ours.same_as(theirs):
        raise FerryError(
            Reason.LAYOUT_MISMATCH,
            f"guest {guest.guest_id} has {theirs.page_count} pages in {len(theirs.regions)} regions at the source, "
            f"its VMM here {ours.page_count} in {len(ours.regions)}, or at other addresses: start it with the same "
            "memory",
        )
