"""The drivers by name. A new kind of VMM is added here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferryd.vmm import own
from pageferryd.vmm.cloud_hypervisor import driver as cloud_hypervisor
from pageferryd.vmm.firecracker import driver as firecracker
from pageferryd.vmm.qemu import driver as qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pageferryd.vmm.driver import VmmDriver


def drivers(runtime_dir: Path) -> Mapping[str, Callable[[str], VmmDriver]]:
    """Return what makes a driver of each kind from a VMM's address; drivers make their files in `runtime_dir`."""
    return {
        own.DRIVER: own.VmmServiceDriver,
        qemu.DRIVER: qemu.QemuDriver,
        cloud_hypervisor.DRIVER: lambda address: cloud_hypervisor.CloudHypervisorDriver(address, runtime_dir),
        firecracker.DRIVER: lambda address: firecracker.FirecrackerDriver(address, runtime_dir),
    }
