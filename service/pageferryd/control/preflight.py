"""What this host needs to move guests: each thing looked at for real, and a remedy for each that is missing."""

from __future__ import annotations

import os
import platform
import re
import resource
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.userfaultfd import DEVICE, feature_names, new_userfaultfd, offered_features
from pageferry.v1 import migration_pb2
from pageferryd.linux.pidfd import PidFd

if TYPE_CHECKING:
    from collections.abc import Callable

_CAP_SYS_PTRACE: Final = 19  # linux/capability.h
_OLDEST_PYTHON: Final = (3, 11)
_OLDEST_KERNEL: Final = (5, 11)
"""UFFD_USER_MODE_ONLY, with which features are asked without privilege; pidfd_getfd(2) is older."""
_FEWEST_FILES: Final = 4096
_SLOW_CLOCKS: Final = frozenset({"acpi_pm", "hpet", "jiffies", "refined-jiffies", "pit"})

# What a migration goes without where the kernel lacks the feature.
_OPTIONAL_FEATURES: Final = {
    abi.UFFD_FEATURE_MISSING_SHMEM: "guests in shared memory cannot come here",
    abi.UFFD_FEATURE_MISSING_HUGETLBFS: "guests in hugepages cannot come here",
    abi.UFFD_FEATURE_MINOR_SHMEM: "shared memory cannot be filled in place",
    abi.UFFD_FEATURE_EVENT_REMOVE: "pages that a balloon gives up are not noticed",
    abi.UFFD_FEATURE_POISON: "a page that the source cannot read stops the guest for good",
}


async def check_host(runtime_dir: Path) -> list[migration_pb2.Check]:
    """Return the checks of this process on this host, always the same ones in the same order.

    `runtime_dir` is where the hand-off sockets will be. Nothing is changed, and none of it takes more than a moment.
    """
    return [
        _check_python(),
        _check_kernel(),
        _check_userfaultfd(),
        _check_features(),
        _check_ptrace(),
        _check_pidfd(),
        _check_kvm(),
        _check_hugepages(),
        _check_files(),
        _check_runtime_dir(runtime_dir),
        _check_overcommit(),
        _check_clock(),
    ]


def _ok(name: str, detail: str) -> migration_pb2.Check:
    return migration_pb2.Check(name=name, status=migration_pb2.CHECK_STATUS_OK, detail=detail)


def _warning(name: str, detail: str, remedy: str) -> migration_pb2.Check:
    return migration_pb2.Check(name=name, status=migration_pb2.CHECK_STATUS_WARNING, detail=detail, remedy=remedy)


def _failed(name: str, detail: str, remedy: str) -> migration_pb2.Check:
    return migration_pb2.Check(name=name, status=migration_pb2.CHECK_STATUS_FAILED, detail=detail, remedy=remedy)


def _check_python(version: tuple[int, ...] = sys.version_info[:3]) -> migration_pb2.Check:
    detail = f"Python {'.'.join(map(str, version))}"
    if version < _OLDEST_PYTHON:
        return _failed("python", detail, "install Python 3.11 or newer, and pageferry with it")
    return _ok("python", detail)


def _check_kernel(release: str | None = None) -> migration_pb2.Check:
    release = release or platform.release()
    detail = f"Linux {release} on {platform.machine()}"
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        return _warning("kernel", detail, "its version cannot be told; use Linux 5.11 or newer, best 6.6 or newer")
    if (int(numbers[1]), int(numbers[2])) < _OLDEST_KERNEL:
        return _failed("kernel", f"{detail} is too old", "boot Linux 5.11 or newer, best 6.6 or newer")
    return _ok("kernel", detail)


def _check_userfaultfd(make: Callable[..., int] = new_userfaultfd) -> migration_pb2.Check:
    try:
        os.close(make(user_mode_only=False))
    except FerryError as error:
        remedy = (
            f"give this user the device (`setfacl -m u:{_user()}:rw {DEVICE}`; in a container pass {DEVICE} in), or "
            "run with CAP_SYS_PTRACE, or `sysctl -w vm.unprivileged_userfaultfd=1`; the kernel needs CONFIG_USERFAULTFD"
        )
        refused = error.reason is Reason.PERMISSION_MISSING
        detail = f"user {_user()} may not open a userfaultfd for faults of the kernel" if refused else error.message
        return _failed("userfaultfd", detail, remedy)
    by = f"from {DEVICE}" if os.access(DEVICE, os.R_OK | os.W_OK) else "by the system call"
    return _ok("userfaultfd", f"opened {by}, faults of the kernel included")


def _check_features(offered: Callable[[], int] = offered_features) -> migration_pb2.Check:
    name = "userfaultfd-features"
    try:
        features = offered()
    except FerryError as error:
        return _failed(name, error.message, 'apply the remedy of "userfaultfd" first')
    lacking = [bit for bit in _OPTIONAL_FEATURES if not features & bit]
    if lacking:
        detail = "; ".join(f"no {feature_names(bit)[0]}: {_OPTIONAL_FEATURES[bit]}" for bit in lacking)
        return _warning(name, detail, "boot Linux 6.6 or newer, which has them all")
    return _ok(name, ", ".join(["MISSING", *(feature_names(bit)[0] for bit in _OPTIONAL_FEATURES)]))


def _check_ptrace(
    status: Path = Path("/proc/self/status"), scope: Path = Path("/proc/sys/kernel/yama/ptrace_scope")
) -> migration_pb2.Check:
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    if effective is not None and int(effective[1], 16) >> _CAP_SYS_PTRACE & 1:
        return _ok("ptrace", "CAP_SYS_PTRACE: the memory of any VMM can be read")
    remedy = (
        "run as root or give CAP_SYS_PTRACE (systemd: AmbientCapabilities=CAP_SYS_PTRACE; "
        "container: --cap-add SYS_PTRACE)"
    )
    # Without yama the classic rule holds: same user, and dumpable.
    level = int(_read(scope, "0"))
    if level > 0:
        detail = f"no CAP_SYS_PTRACE, and kernel.yama.ptrace_scope is {level}: memory of other processes is closed"
        return _failed("ptrace", detail, f"{remedy}, or run as the VMM's user with kernel.yama.ptrace_scope=0")
    detail = f"no CAP_SYS_PTRACE: only VMMs of user {_user()} can be read"
    return _warning("ptrace", detail, remedy)


def _check_pidfd() -> migration_pb2.Check:
    reader, writer = os.pipe()
    try:
        with PidFd(os.getpid()) as process:
            os.close(process.get_fd(reader))
    except FerryError as error:
        return _failed(
            "pidfd_getfd", error.message, "use Linux 5.6 or newer, and a seccomp profile that allows pidfd_getfd(2)"
        )
    finally:
        os.close(reader)
        os.close(writer)
    return _ok("pidfd_getfd", "file descriptors of VMMs can be taken")


def _check_kvm(device: Path = Path("/dev/kvm")) -> migration_pb2.Check:
    if not device.exists():
        return _warning(
            "kvm", f"no {device}: no virtual machines here", "`modprobe kvm_intel` or `modprobe kvm_amd`, or turn on "
            "virtualisation in the firmware (or nesting, in a virtual machine)",
        )  # fmt: skip
    if not os.access(device, os.R_OK | os.W_OK):
        return _warning(
            "kvm", f"{device} may not be opened by user {_user()}", "`usermod -aG kvm USER`, then log in again"
        )
    return _ok("kvm", f"{device} can be opened")


def _check_hugepages(meminfo: Path = Path("/proc/meminfo")) -> migration_pb2.Check:
    values = dict(
        re.findall(r"^(HugePages_Total|HugePages_Free|Hugepagesize):\s*(\d+)", meminfo.read_text(), re.MULTILINE)
    )
    total, free = values.get("HugePages_Total", "0"), values.get("HugePages_Free", "0")
    if total == "0":
        return _ok("hugepages", "none reserved; only guests in hugepages need them (`sysctl -w vm.nr_hugepages=N`)")
    return _ok("hugepages", f"{free} of {total} free, {values.get('Hugepagesize', '?')} KiB each")


def _check_files(limit: int | None = None) -> migration_pb2.Check:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY or soft >= _FEWEST_FILES:
        return _ok("fd-limit", "unlimited open files" if soft == resource.RLIM_INFINITY else f"{soft} open files")
    return _warning(
        "fd-limit",
        f"only {soft} open files: many guests at once will run out of them",
        f"`ulimit -n {_FEWEST_FILES}` (systemd: LimitNOFILE={_FEWEST_FILES * 16})",
    )


def _check_runtime_dir(path: Path) -> migration_pb2.Check:
    name, user = "runtime-dir", _user()
    make = f"`install -d -m 0700 -o {user} {path}`"
    try:
        found = path.stat()
    except FileNotFoundError:
        return _check_creatable(path, make)
    except OSError as error:
        return _failed(name, f"{path}: {error.strerror}", f"{make}, or configure another runtime_dir")
    if not stat.S_ISDIR(found.st_mode):
        return _failed(name, f"{path} is no directory", f"move it away, then {make}; or configure another runtime_dir")
    mode = stat.S_IMODE(found.st_mode)
    if not os.access(path, os.W_OK | os.X_OK):
        return _failed(
            name, f"user {user} may not make sockets in {path} (mode {mode:04o})",
            f"`chown {user} {path}`, mount it writable, or configure another runtime_dir",
        )  # fmt: skip
    if mode & 0o022:
        return _failed(name, f"others may replace the sockets in {path} (mode {mode:04o})", f"`chmod 0700 {path}`")
    if mode & 0o044:
        return _warning(name, f"others may look into {path} (mode {mode:04o})", f"`chmod 0700 {path}`")
    return _ok(name, f"{path} is writable and private")


def _check_creatable(path: Path, make: str) -> migration_pb2.Check:
    # A path always has the root above it, which exists.
    above = next(parent for parent in path.parents if parent.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return _ok("runtime-dir", f"{path} will be made in {above}")
    return _failed(
        "runtime-dir",
        f"{path} does not exist, and user {_user()} may not make it in {above}",
        f"{make} as root, or configure another runtime_dir",
    )


def _check_overcommit(setting: Path = Path("/proc/sys/vm/overcommit_memory")) -> migration_pb2.Check:
    if _read(setting, "0") == "2":
        return _warning(
            "overcommit",
            "vm.overcommit_memory is 2: all memory of an incoming guest must fit the commit limit from the start",
            "`sysctl -w vm.overcommit_memory=0`, or raise vm.overcommit_ratio",
        )
    return _ok("overcommit", "an incoming guest's memory is taken as it comes")


def _check_clock(
    source: Path = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
) -> migration_pb2.Check:
    name = _read(source, "unknown")
    if name in _SLOW_CLOCKS:
        return _warning(
            "clock",
            f"clocksource {name}: each look at the clock takes microseconds, and faults have five",
            "choose a faster one of available_clocksource (boot with tsc=reliable where the machine's is)",
        )
    resolution = time.get_clock_info("monotonic").resolution
    return _ok("clock", f"clocksource {name}, {resolution * 1e9:.0f} ns")


def _read(path: Path, otherwise: str) -> str:
    """Return a small file's text, or `otherwise` where this kernel or container does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return otherwise


def _user() -> str:
    return str(os.geteuid())
