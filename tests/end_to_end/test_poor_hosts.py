"""Hosts that lack something: an address, a configuration, a permission, room on a disk, a log that is read."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from child import DEADLINE
from crossing import Stage, until
from sidecar_process import COMMAND, Sidecar, run_to_its_end, write_config

from pageferry.errors import Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


def test_a_port_that_is_taken_is_said_and_ends_the_sidecar(alpha: Sidecar, short_path: Path) -> None:
    common = ("--insecure", "--runtime-dir", str(short_path / "run"))
    for addresses in (("--listen", alpha.address), ("--listen", "127.0.0.1:0", "--http", alpha.http)):
        ended = run_to_its_end(*common, "--http", "127.0.0.1:0", *addresses, cwd=short_path)
        assert ended.returncode == 2
        assert Reason.ADDRESS_IN_USE in ended.stderr
        assert addresses[-1] in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_configuration_that_cannot_be_is_said_and_ends_the_sidecar(short_path: Path) -> None:
    config = write_config(short_path / "bad.toml", {"insecure": True, "listen": ["0.0.0.0:1"], "hots": "x"})
    for arguments, says in (
        (("--config", str(config)), "hots"),
        (("--config", str(short_path / "none.toml")), "none.toml"),
        (("--insecure", "--listen", "0.0.0.0:0"), "loopback"),
        ((), "tls"),
        (("--insecure", "--runtime-dir", "/proc/nowhere"), "/proc/nowhere"),
    ):
        ended = run_to_its_end(*arguments, cwd=short_path)
        assert ended.returncode == 2, ended
        assert says in ended.stderr
        assert "Traceback" not in ended.stderr


WITHOUT_USERFAULTFD = """
    mount --bind "$0" /dev/userfaultfd &&
    exec setpriv --bounding-set=-sys_ptrace,-dac_override,-dac_read_search --inh-caps=-all "$@"
"""


@pytest.fixture
def without_userfaultfd(short_path: Path) -> tuple[str, ...]:
    """A command that runs another where the device may not be opened, and the system call is not permitted."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is set: everybody may")
    closed = short_path / "closed"
    closed.touch(0o000)
    prefix = ("unshare", "--mount", "sh", "-c", WITHOUT_USERFAULTFD, str(closed))
    probe = subprocess.run([*prefix, sys.executable, "-c", "pass"], capture_output=True, text=True, timeout=DEADLINE)
    if probe.returncode:
        pytest.skip(f"no mount namespace without a userfaultfd here: {probe.stderr.strip()}")
    return prefix


async def test_a_host_without_userfaultfd_says_so_and_takes_no_guest(
    stage: Stage, alpha: Sidecar, without_userfaultfd: tuple[str, ...]
) -> None:
    poor = await stage.sidecar("poor", prefix=without_userfaultfd)
    crossing = await stage.crossing(alpha, poor, waits=False)
    waiting = await stage.guest("waiting", "--incoming", prefix=without_userfaultfd)
    await stage.register(crossing.at_destination, crossing.guest_id, waiting)

    found = await crossing.at_source.preflight(crossing.guest_id, poor.address)
    assert {check.name: check.status for check in found.checks}["userfaultfd"] == pb.CHECK_STATUS_OK
    there = {check.name: check for check in found.destination_checks}
    assert there["userfaultfd"].status == pb.CHECK_STATUS_FAILED
    assert "/dev/userfaultfd" in there["userfaultfd"].remedy
    assert there["guest"].status == pb.CHECK_STATUS_OK

    await crossing.start()
    failed = await crossing.fails(Reason.PERMISSION_MISSING)
    assert "/dev/userfaultfd" in failed.error.message


@pytest.fixture
def full_disk(short_path: Path) -> Iterator[Path]:
    """A file system without room for anything but what has no contents."""
    mounted = short_path / "full"
    mounted.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=16", "ferry-test", mounted], check=False)
    if made.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        (mounted / "ballast").write_bytes(bytes(4096))
        with pytest.raises(OSError, match="No space left"):
            (mounted / "more").write_bytes(b"more")
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


async def test_a_disk_too_full_to_note_a_guest_is_said_before_that_stops(
    stage: Stage, alpha: Sidecar, full_disk: Path
) -> None:
    destination = await stage.sidecar("destination", runtime_dir=full_disk / "run")
    crossing = await stage.crossing(alpha, destination)
    await crossing.start()
    failed = await crossing.fails(Reason.NO_SPACE)
    assert str(full_disk) in failed.error.message
    assert not failed.HasField("downtime")


async def test_a_runtime_directory_that_takes_no_socket_is_named(stage: Stage, alpha: Sidecar, full_disk: Path) -> None:
    destination = await stage.sidecar("destination", runtime_dir=full_disk / "run")
    crossing = await stage.crossing(alpha, destination)
    while True:
        try:
            (full_disk / os.urandom(4).hex()).touch()
        except OSError:
            break
    await crossing.start()
    # Which of the two the kernel does not always let gRPC tell.
    failed = await crossing.fails(Reason.NO_SPACE, Reason.PERMISSION_MISSING)
    assert str(full_disk) in failed.error.message


async def test_logs_that_cannot_be_written_do_not_stop_a_migration(
    stage: Stage, alpha: Sidecar, short_path: Path
) -> None:
    api = short_path / "mute.sock"
    config = write_config(
        short_path / "mute.toml",
        {
            "insecure": True, "host": "mute", "listen": [f"unix:{api}"], "http": "127.0.0.1:0",
            "runtime_dir": str(short_path / "mute-run"),
        },
    )  # fmt: skip
    process = await asyncio.to_thread(start_mute, config)
    stage.stack.callback(process.wait, DEADLINE)
    stage.stack.callback(process.kill)

    async def listens() -> bool:
        assert process.poll() is None
        return api.is_socket()

    await until(listens, "the mute sidecar listens")
    mute = Mute(f"unix:{api}", process.pid)
    crossing = await stage.crossing(alpha, mute)
    await crossing.start()
    await crossing.arrives()
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, DEADLINE) == 0


def start_mute(config: Path) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "--config", str(config)]
    with open("/dev/full", "wb") as full:
        return subprocess.Popen(command, stderr=full, stdin=subprocess.DEVNULL)


class Mute(Sidecar):
    """A sidecar that nobody can read."""

    def __init__(self, address: str, pid: int) -> None:
        self.address, self.name, self.tls = address, "mute", None
        self._pid = pid

    @property
    def pid(self) -> int:
        return self._pid
