"""What `vm.info` says of a VM: what it does, how much memory it has, and what keeps it from being moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pageferry.errors import FerryError, Reason
from pageferryd.vmm.driver import Activity, Description

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNNING = "Running"
PAUSED = "Paused"


def describe(info: dict[str, Any] | None, pid: int, vmm: str) -> Description:
    """Return the description of a VMM; `info` is None where it has no VM, `vmm` names it in errors.

    FerryError(VMM_FAILED) where what it says makes no sense.
    """
    if info is None:
        return Description(Activity.INCOMING, pid, None)
    try:
        state = str(info["state"])
        memory = info["config"]["memory"]
        # A VM has one zone, or its memory is those listed.
        zones = memory.get("zones") or [memory]
        size = sum(int(zone["size"]) + int(zone.get("hotplugged_size") or 0) for zone in zones)
        obstacles = list(_obstacles(state, memory, zones))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise FerryError(
            Reason.VMM_FAILED,
            f"{vmm} describes its VM in a way that is not understood: {type(error).__name__}: {error}",
        ) from error
    if not 0 <= size < 1 << 63:
        raise FerryError(Reason.VMM_FAILED, f"{vmm} says that its VM has more memory than can be, or less")
    activity = Activity.RUNNING if state == RUNNING else Activity.PAUSED
    return Description(activity, pid, None, memory_bytes=size, obstacles=obstacles)


def _obstacles(state: str, memory: dict[str, Any], zones: list[dict[str, Any]]) -> Iterator[str]:
    if state not in (RUNNING, PAUSED):
        yield f"its VM is {state}: boot it first"
    if not all(zone.get("shared") for zone in zones):
        yield "its memory is not shared: start it with --memory shared=on"
    if any(zone.get("hugepages") for zone in zones):
        yield "its memory has huge pages, which Cloud Hypervisor's guests are not moved with: start it without them"
    if any(zone.get("file") for zone in zones):
        yield "its memory is a file: start it without file="
    if any(zone.get("prefault") for zone in zones):
        yield "its memory is prefaulted, which hides what is missing at the destination: start it without prefault=on"
    if memory.get("hotplug_method") == "VirtioMem" and any(zone.get("hotplug_size") for zone in zones):
        yield "it has virtio-mem memory, which is not moved: start it with hotplug_method=acpi"
