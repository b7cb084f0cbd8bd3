from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from pageferryd import config
from pageferryd.keeper.running import CAPACITY

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "pageferryd.service"
EXAMPLE = ROOT / "deploy" / "pageferryd.toml"
SECONDS = re.compile(r"(\d+)s")
VERSION = re.compile(r"systemd (\d+)")

# What pageferryd calls that a service is not allowed as a matter of course.
NEEDED_CALLS = {
    "userfaultfd",
    "ioctl",
    "process_vm_readv",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "memfd_create",
    "madvise",
    "pread64",
    "recvmsg",
    "epoll_pwait",
    "process_madvise",
    "process_vm_writev",
    "fallocate",
}


def settings(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in text.splitlines():
        if "=" in line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    return settings(UNIT.read_text())


@pytest.fixture
def systemd_analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is missing; it is in the package systemd")
    return program


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_systemd_finds_nothing_wrong_with_the_unit(systemd_analyze: str, tmp_path: Path) -> None:
    # The program is not installed where tests run; systemd wants one that exists.
    copy = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/opt/pageferry/bin/pageferryd", "/bin/true")
    version = VERSION.match(run(systemd_analyze, "--version").stdout)
    assert version is not None
    if int(version[1]) < 254:
        # It ignores the setting, and says so.
        text = text.replace("FileDescriptorStorePreserve=yes\n", "")
    copy.write_text(text)

    verified = run(systemd_analyze, "verify", "--man=no", str(copy))

    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_a_misspelt_setting_would_be_found(systemd_analyze: str, tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/opt/pageferry/bin/pageferryd", "/bin/true")
    copy.write_text(text.replace("ProtectSystem=", "ProtectSistem="))

    assert "ProtectSistem" in run(systemd_analyze, "verify", "--man=no", str(copy)).stderr


def test_the_system_call_filter_lets_through_what_the_sidecar_calls(
    systemd_analyze: str, unit: dict[str, list[str]]
) -> None:
    listing = run(systemd_analyze, "syscall-filter").stdout
    groups: dict[str, set[str]] = defaultdict(set)
    group = ""
    for line in listing.splitlines():
        if line.startswith("@"):
            group = line.strip()
        elif line.startswith("    ") and not line.strip().startswith("#"):
            groups[group].add(line.strip())

    def expand(names: set[str]) -> set[str]:
        return {call for name in names for call in (expand(groups[name]) if name.startswith("@") else {name})}

    allowed = expand(set(unit["SystemCallFilter"][0].split()))

    assert allowed >= NEEDED_CALLS
    assert "ptrace" not in allowed
    assert "mount" not in allowed


def test_the_capabilities_are_those_that_read_guests_and_map_them_huge(unit: dict[str, list[str]]) -> None:
    assert unit["CapabilityBoundingSet"] == ["CAP_SYS_PTRACE CAP_SYS_NICE"]
    assert unit["AmbientCapabilities"] == ["CAP_SYS_PTRACE CAP_SYS_NICE"]
    assert unit["NoNewPrivileges"] == ["yes"]


def test_the_only_device_is_userfaultfd(unit: dict[str, list[str]]) -> None:
    assert unit["DevicePolicy"] == ["closed"]
    assert unit["DeviceAllow"] == ["/dev/userfaultfd rw"]
    assert "PrivateDevices" not in unit


def test_processes_of_vmms_and_their_sockets_stay_visible(unit: dict[str, list[str]]) -> None:
    assert unit["PrivateTmp"] == ["no"]
    assert unit["ProtectProc"] == ["default"]
    assert "PrivateNetwork" not in unit
    assert "PrivateUsers" not in unit


def test_systemd_waits_longer_for_the_end_than_the_sidecar_drains(unit: dict[str, list[str]]) -> None:
    stop = SECONDS.fullmatch(unit["TimeoutStopSec"][0])
    assert stop is not None
    assert int(stop[1]) > config.Settings.model_fields["drain_seconds"].default


def test_the_runtime_directory_is_the_configured_one_and_only_for_its_owner(unit: dict[str, list[str]]) -> None:
    example = config.load(EXAMPLE)
    assert example.runtime_dir == Path("/run") / unit["RuntimeDirectory"][0]
    assert unit["RuntimeDirectoryMode"] == ["0711"]
    assert example.api_socket is not None
    assert example.api_socket.is_relative_to(example.runtime_dir)


def test_systemd_holds_the_descriptors_of_guests_under_way(unit: dict[str, list[str]]) -> None:
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert unit["FileDescriptorStorePreserve"] == ["yes"]
    # As many as the keeper holds, which stands in for systemd elsewhere; older systemd does not say how many it holds.
    assert unit["FileDescriptorStoreMax"] == [str(CAPACITY)]
    assert unit["Environment"] == [f"FDSTORE={CAPACITY}"]
    assert int(unit["LimitNOFILE"][0]) > 2 * CAPACITY


def test_a_configuration_that_cannot_be_used_is_not_tried_again(unit: dict[str, list[str]]) -> None:
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == ["2"]


def test_the_unit_names_the_configuration_file_that_is_the_default(unit: dict[str, list[str]]) -> None:
    assert unit["ExecStart"][0].endswith(f"--config {config.DEFAULT_PATH}")


def test_the_example_configuration_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load(EXAMPLE)

    assert not loaded.insecure
    assert loaded.tls is not None
    assert loaded.host in loaded.peers


def test_what_the_example_comments_out_is_at_its_default(tmp_path: Path) -> None:
    everything = re.sub(r"(?m)^# ([a-z_]+ = )", r"\1", EXAMPLE.read_text())
    copy = tmp_path / "pageferryd.toml"
    copy.write_text(everything)

    shown, example = config.load(copy), config.load(EXAMPLE)

    assert everything != EXAMPLE.read_text()
    # The one line that has no default to show: advertise repeats what listen says.
    assert shown.advertise == example.listen[0]
    assert shown.model_dump(exclude={"advertise"}) == example.model_dump(exclude={"advertise"})
