"""Whether a VMM guards the memory that it was given: else it would run its guest on zeroes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from typing import Final

_USERFAULTFD: Final = "anon_inode:[userfaultfd]"
_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage")
_BY_ITSELF: Final = ("always", "within_size", "force")


def refuse_unless_on_demand(pid: int, vmm: str, *, has_all: bool) -> None:
    """Refuse a VMM whose guest could read a page that has not come. FerryError: VMM_FAILED, PERMISSION_MISSING.

    `has_all`: it has hung up, and needs no guard any more. `vmm` names it in errors.
    """
    try:
        features = _features(pid)
    except OSError as error:
        raise FerryError(
            Reason.PERMISSION_MISSING, f"cannot see whether {vmm} guards its memory: {error}; run pageferryd as root"
        ) from error
    if has_all:
        return
    if not features:
        raise FerryError(
            Reason.VMM_FAILED,
            f"{vmm} took the guest without a userfaultfd over its memory, and would run it on zeroes: use Cloud "
            "Hypervisor v53 or newer",
        )
    if _files_may_have_huge_pages(_HUGE) and not any(one & abi.UFFD_FEATURE_MINOR_SHMEM for one in features):
        raise FerryError(
            Reason.VMM_FAILED,
            f"{vmm} sees no minor faults, and this host gives shared memory huge pages: its guest would read zeroes "
            f"beside each page that has come. Use a newer Cloud Hypervisor than v53.0, or write advise to "
            f"{_HUGE}/shmem_enabled",
        )


def _features(pid: int) -> list[int]:
    """Return the UFFD_FEATURE_* bits of each userfaultfd that the process has."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(link.readlink()) == _USERFAULTFD:
                found.append(_features_in(Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()))
        except FileNotFoundError:
            # Closed meanwhile.
            continue
    return found


def _features_in(info: str) -> int:
    lines = [line for line in info.splitlines() if line.startswith("API:")]
    return int(lines[0].split(":")[2], 16) if lines else 0


def _files_may_have_huge_pages(directory: Path) -> bool:
    """Say whether the kernel may back a memfd with huge pages that nobody asked for (Documentation: transhuge)."""
    general = _chosen(directory / "shmem_enabled")
    sizes = [_chosen(file) for file in directory.glob("hugepages-*/shmem_enabled")]
    if general == "force" or not sizes:
        return general in _BY_ITSELF
    return any((general if one == "inherit" else one) in _BY_ITSELF for one in sizes)


def _chosen(file: Path) -> str:
    """Return the word in brackets."""
    try:
        return file.read_text().partition("[")[2].partition("]")[0]
    except FileNotFoundError:
        return "never"
