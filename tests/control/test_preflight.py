"""What preflight finds: on this host for real, and on hosts that lack something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pageferry.abi import userfaultfd as abi
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control import preflight
from pageferryd.control.preflight import check_host

OK, WARNING, FAILED = (
    migration_pb2.CHECK_STATUS_OK,
    migration_pb2.CHECK_STATUS_WARNING,
    migration_pb2.CHECK_STATUS_FAILED,
)
NAMES = [
    "python", "kernel", "userfaultfd", "userfaultfd-features", "ptrace", "pidfd_getfd", "kvm", "hugepages", "fd-limit",
    "runtime-dir", "overcommit", "clock",
]  # fmt: skip
ALL_FEATURES = (1 << 17) - 1


async def test_the_checks_come_in_a_fixed_order_each_with_its_remedy_when_it_is_not_in_order(tmp_path: Path) -> None:
    checks = await check_host(tmp_path)
    assert [check.name for check in checks] == NAMES
    for check in checks:
        assert check.detail
        assert check.status in (OK, WARNING, FAILED)
        assert bool(check.remedy) is (check.status != OK)


@pytest.mark.root
@pytest.mark.userfaultfd
async def test_on_a_host_that_can_move_guests_nothing_fails_and_no_file_stays_open(tmp_path: Path) -> None:
    before = open_files()
    checks = await check_host(tmp_path)
    assert [check for check in checks if check.status == FAILED] == []
    assert open_files() == before


def open_files() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


UNPRIVILEGED = """
import asyncio, os, pathlib, resource, sys
from pageferryd.control.preflight import check_host
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for check in asyncio.run(check_host(pathlib.Path(sys.argv[1]))):
    print(check.name, check.status, check.detail, check.remedy, sep="\\t")
"""


@pytest.mark.root
@pytest.mark.userfaultfd
def test_a_process_without_rights_is_told_which_ones_it_lacks(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("this kernel gives a userfaultfd to everybody")
    run = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    rows = {name: (int(status), detail, remedy) for name, status, detail, remedy in
            (line.split("\t") for line in run.stdout.splitlines())}  # fmt: skip
    assert rows["userfaultfd"][0] == FAILED
    assert "vm.unprivileged_userfaultfd=1" in rows["userfaultfd"][2]
    assert "setfacl -m u:65534:rw /dev/userfaultfd" in rows["userfaultfd"][2]
    assert rows["ptrace"][0] in (WARNING, FAILED)
    assert "CAP_SYS_PTRACE" in rows["ptrace"][2]
    assert rows["fd-limit"][0] == WARNING
    assert "256" in rows["fd-limit"][1]
    assert rows["runtime-dir"][0] == FAILED
    assert "install -d -m 0700 -o 65534" in rows["runtime-dir"][2]
    assert rows["python"][0] == OK


@pytest.mark.parametrize(
    ("release", "status"),
    [("5.10.0-21-amd64", FAILED), ("4.19.0", FAILED), ("5.11.0", OK), ("6.18.1-custom", OK), ("mystery", WARNING)],
)
def test_an_old_kernel_fails(release: str, status: int) -> None:
    assert preflight._check_kernel(release).status == status


def test_an_old_python_fails() -> None:
    assert preflight._check_python((3, 10, 9)).status == FAILED
    assert preflight._check_python((3, 11, 0)).status == OK


def test_a_kernel_without_userfaultfd_fails_with_its_own_words() -> None:
    def none(*, user_mode_only: bool) -> int:
        raise FerryError(Reason.USERFAULTFD_UNAVAILABLE, "userfaultfd(2) failed: Function not implemented")

    check = preflight._check_userfaultfd(none)
    assert check.status == FAILED
    assert "not implemented" in check.detail
    assert "CONFIG_USERFAULTFD" in check.remedy


def test_each_feature_that_is_missing_is_named_with_what_goes_without_it() -> None:
    assert preflight._check_features(lambda: ALL_FEATURES).status == OK
    lacking = ALL_FEATURES & ~abi.UFFD_FEATURE_POISON & ~abi.UFFD_FEATURE_MINOR_SHMEM
    check = preflight._check_features(lambda: lacking)
    assert check.status == WARNING
    assert "no POISON: a page that the source cannot read" in check.detail
    assert "no MINOR_SHMEM" in check.detail
    assert "HUGETLBFS" not in check.detail


def test_features_of_no_userfaultfd_fail() -> None:
    def none() -> int:
        raise FerryError(Reason.USERFAULTFD_UNAVAILABLE, "none here")

    assert preflight._check_features(none).status == FAILED


@pytest.mark.parametrize(
    ("capabilities", "scope", "status"),
    [
        ("000001ffffffffff", "3", OK),
        ("0000000000080000", "1", OK),
        ("0000000000000000", "0", WARNING),
        ("0000000000000000", None, WARNING),
        ("0000000000000000", "1", FAILED),
        ("fffffffffff7ffff", "2", FAILED),
    ],
)
def test_reading_other_processes_needs_the_capability_or_an_open_yama(
    capabilities: str, scope: str | None, status: int, tmp_path: Path
) -> None:
    (tmp_path / "status").write_text(f"Name:\tx\nCapPrm:\t{'f' * 16}\nCapEff:\t{capabilities}\nCapBnd:\t{'f' * 16}\n")
    if scope is not None:
        (tmp_path / "scope").write_text(f"{scope}\n")
    assert preflight._check_ptrace(tmp_path / "status", tmp_path / "scope").status == status


def test_a_host_without_kvm_gets_a_warning_only(tmp_path: Path) -> None:
    check = preflight._check_kvm(tmp_path / "kvm")
    assert check.status == WARNING
    assert "modprobe" in check.remedy


def test_hugepages_are_counted(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1 kB\nHugePages_Total:    8\nHugePages_Free:     3\nHugepagesize:    2048 kB\n")
    assert preflight._check_hugepages(meminfo).detail == "3 of 8 free, 2048 KiB each"
    meminfo.write_text("HugePages_Total:    0\nHugePages_Free:     0\nHugepagesize:    2048 kB\n")
    assert preflight._check_hugepages(meminfo).status == OK


@pytest.mark.parametrize(("limit", "status"), [(1024, WARNING), (4096, OK), (-1, OK)])
def test_few_open_files_are_a_warning(limit: int, status: int) -> None:
    assert preflight._check_files(limit).status == status


@pytest.mark.parametrize(
    ("mode", "status"), [(0o700, OK), (0o750, WARNING), (0o755, WARNING), (0o770, FAILED), (0o777, FAILED)]
)
def test_the_runtime_directory_must_be_private(mode: int, status: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    check = preflight._check_runtime_dir(tmp_path)
    assert check.status == status
    assert ("chmod 0700" in check.remedy) is (status != OK)


def test_a_runtime_directory_that_can_be_made_is_in_order_and_not_made_yet(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert preflight._check_runtime_dir(path).status == OK
    assert not path.parent.exists()


def test_a_file_in_the_place_of_the_runtime_directory_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert preflight._check_runtime_dir(path).status == FAILED
    assert preflight._check_runtime_dir(path / "below").status == FAILED


@pytest.mark.parametrize(("value", "status"), [("0", OK), ("1", OK), ("2", WARNING), (None, OK)])
def test_strict_overcommit_is_a_warning(value: str | None, status: int, tmp_path: Path) -> None:
    path = tmp_path / "overcommit_memory"
    if value is not None:
        path.write_text(value + "\n")
    assert preflight._check_overcommit(path).status == status


@pytest.mark.parametrize(("name", "status"), [("tsc", OK), ("kvm-clock", OK), ("hpet", WARNING), ("acpi_pm", WARNING)])
def test_a_slow_clock_is_a_warning(name: str, status: int, tmp_path: Path) -> None:
    path = tmp_path / "current_clocksource"
    path.write_text(name + "\n")
    check = preflight._check_clock(path)
    assert check.status == status
    assert re.search(rf"clocksource {name}\b", check.detail)
