"""What both ends of a migration say of its guest's owner, by the guest's name.

`lost` may run at beta, which does not answer; `asked` runs at beta, which answers; `mute` is as `lost`, and its sidecar
goes away over the decision; `coming` is shown by its destination.
"""

from __future__ import annotations

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

IN_DOUBT = ("asked", "coming", "lost", "mute")


def source(**changed) -> pb.HandoverView:
    """Return what a source in doubt says."""
    said = {
        "role": pb.ROLE_SOURCE,
        "host": "alpha",
        "reachable": True,
        "known": True,
        "state": pb.MIGRATION_STATE_IN_DOUBT,
        "handed_over": True,
        "vmm_activity": "paused",
    }
    return pb.HandoverView(**said | changed)


def destination(**changed) -> pb.HandoverView:
    """Return what a destination says that runs the guest and lacks 300 pages."""
    said = {
        "role": pb.ROLE_DESTINATION,
        "host": "beta",
        "reachable": True,
        "known": True,
        "state": pb.MIGRATION_STATE_POSTCOPY_PAUSED,
        "handed_over": True,
        "vmm_activity": "running",
        "pages_missing": 300,
    }
    return pb.HandoverView(**said | changed)


def unreachable(role: pb.Role.ValueType = pb.ROLE_DESTINATION, host: str = "beta") -> pb.HandoverView:
    return pb.HandoverView(role=role, host=host, detail="127.0.0.1:7444: connection refused")


def ends(guest_id: str) -> list[pb.HandoverView]:
    if guest_id == "coming":
        return [destination(), unreachable(pb.ROLE_SOURCE, "alpha")]
    return [source(), destination() if guest_id == "asked" else unreachable()]


def decided(guest_id: str, request: pb.ResolveMigrationRequest) -> list[pb.HandoverView]:
    """Return both ends after the decision. Raises FerryError where it is refused."""
    here, there = ends(guest_id)
    if there.reachable:
        raise FerryError(Reason.IN_DOUBT, f"{there.host} answers and has not given {guest_id} up; give it up there")
    if here.role == pb.ROLE_SOURCE and not request.peer_fenced:
        raise FerryError(Reason.IN_DOUBT, f"{there.host} cannot be asked about {guest_id}: make sure that it is off")
    here.state = pb.MIGRATION_STATE_FAILED
    here.vmm_activity = "running" if request.decision == pb.DECISION_RUN_AT_SOURCE else ""
    here.handed_over = False
    here.pages_missing = 0
    here.detail = "decided by an operator"
    return [here, there]
