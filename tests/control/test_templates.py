"""VMMs that are started from templates: found waiting and registered, or ended with everything that came with them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.config import Template
from pageferryd.control import launched, templates
from pageferryd.control.record import MigrationRecord
from pageferryd.control.registry import GuestRegistry
from pageferryd.control.templates import StartedVmm, VmmStarter
from pageferryd.core.lifecycle import State
from pageferryd.linux.pidfd import PidFd
from pageferryd.vmm.own import VmmServiceDriver

DEADLINE = 20.0
GUEST = [sys.executable, "-m", "pageferry.guests.process", "--socket", "{socket}", "--memory", "1M", "--detach"]
WAITING = [*GUEST, "--incoming"]
SHELL = ["sh", "-c"]


def template(command: list[str], seconds: float = DEADLINE, guests: str = "*", driver: str = "vmm") -> Template:
    return Template.model_validate({"driver": driver, "guests": guests, "command": command, "start_timeout": seconds})


def record(migration_id: str = "m") -> MigrationRecord:
    return MigrationRecord(
        migration_id, "", "web", migration_pb2.ROLE_DESTINATION, "a", "b", "", migration_pb2.Limits()
    )


class Host:
    """A registry and a starter; what the starter leaves running is killed at the end of the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.guests = GuestRegistry({"vmm": VmmServiceDriver})
        self.starter = self.has(template(WAITING))
        self.pids: list[int] = []

    def has(self, *given: Template, most: int = 8) -> VmmStarter:
        self.starter = VmmStarter(given, self.guests, self.directory, most)
        return self.starter

    async def started(self, guest_id: str = "web") -> StartedVmm:
        vmm = await self.starter.start(guest_id, "vmm")
        assert vmm is not None
        self.pids.append(vmm.process.pid)
        return vmm

    async def refused(self, guest_id: str = "web") -> FerryError:
        with pytest.raises(FerryError) as caught:
            await asyncio.wait_for(self.starter.start(guest_id, "vmm"), DEADLINE)
        return caught.value

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    async def close(self) -> None:
        await self.starter.close()
        await self.guests.close()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.killpg(pid, signal.SIGKILL)
                await asyncio.to_thread(os.waitpid, pid, 0)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    # Room for the names of sockets: pytest's own directories have long paths.
    with tempfile.TemporaryDirectory(prefix="ferry-") as directory:
        one = Host(Path(directory))
        yield one
        await one.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.01)


def is_process(pid: int) -> bool:
    """Say whether there is such a process; one that has ended and was not reaped is one."""
    return Path(f"/proc/{pid}").exists()


async def gone(pid: int) -> None:
    """Wait until a process has ended: reaped, or a zombie of whoever adopted it."""
    with contextlib.suppress(FerryError), PidFd(pid) as process:
        assert await asyncio.to_thread(process.wait, DEADLINE)


async def finished(vmm: StartedVmm) -> None:
    assert vmm.attending is not None
    await asyncio.wait_for(asyncio.shield(vmm.attending), DEADLINE)


async def test_a_vmm_is_started_in_a_session_of_its_own_and_registered_once_it_waits(host: Host) -> None:
    vmm = await host.started()
    (listed,) = await host.guests.list()
    assert (listed.guest_id, listed.pid) == ("web", vmm.process.pid)
    assert listed.state == migration_pb2.GUEST_STATE_INCOMING
    assert listed.vmm_address == f"{host.directory}/vmm-web.sock"
    assert os.getsid(vmm.process.pid) == vmm.process.pid
    await host.starter.discard(vmm)


async def test_it_ends_with_a_migration_that_fails_before_the_commit(host: Host) -> None:
    vmm = await host.started()
    migration = record()
    host.guests.claim("web", "m")
    host.starter.attend(vmm, migration)

    migration.fail(FerryError(Reason.LAYOUT_MISMATCH, "as the test says"))
    vmm.guest.migration_id = None
    await finished(vmm)

    assert vmm.process.status is not None
    assert not host.guests.knows("web")
    assert host.files == []


async def test_a_vmm_that_its_migration_has_killed_already_is_reaped(host: Host) -> None:
    vmm = await host.started()
    migration = record()
    host.guests.claim("web", "m")
    host.starter.attend(vmm, migration)

    migration.fail(FerryError(Reason.ABORTED_BY_SOURCE, "as the test says"))
    await vmm.guest.driver.kill()
    await host.guests.forget(vmm.guest)
    await finished(vmm)

    assert not is_process(vmm.process.pid)
    assert host.files == []


async def test_a_vmm_that_waits_for_the_next_migration_by_now_is_left_to_it(host: Host) -> None:
    vmm = await host.started()
    migration = record()
    host.guests.claim("web", "m")
    host.starter.attend(vmm, migration)

    migration.fail(FerryError(Reason.ABORTED_BY_SOURCE, "as the test says"))
    vmm.guest.migration_id = None
    host.guests.claim("web", "next")
    # Until it has looked at the guest again.
    await until(lambda: vmm.kept)

    assert vmm.process.status is None
    assert host.guests.get("web").migration_id == "next"


async def test_it_outlives_a_migration_that_fails_after_the_commit(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_END_SECONDS", 0.5)
    vmm = await host.started()
    migration = record()
    host.guests.claim("web", "m")
    host.starter.attend(vmm, migration)
    for state in (State.PREPARING, State.HANDING_OVER):
        migration.lifecycle.to(state)

    host.starter.keep("m")
    # All in one step of the loop: nobody sees the states between.
    migration.lifecycle.to(State.POSTCOPY)
    migration.fail(FerryError(Reason.SOURCE_LOST, "as the test says"))
    vmm.guest.migration_id = None
    # The next start waits for an end that does not come.
    await host.guests.unregister("web")

    assert (await host.refused()).reason is Reason.GUEST_EXISTS
    assert vmm.process.status is None


async def test_when_it_ends_later_its_guest_is_forgotten_and_can_come_again(host: Host) -> None:
    vmm = await host.started()
    host.starter.attend(vmm, record())
    host.starter.keep("m")
    os.kill(vmm.process.pid, signal.SIGKILL)
    await finished(vmm)

    assert not host.guests.knows("web")
    again = await host.starter.start("web", "vmm")
    assert again is not None
    await host.starter.discard(again)
    assert host.files == []


async def test_the_end_of_the_sidecar_leaves_a_committed_vmm_running_and_ends_the_others(host: Host) -> None:
    vmm, other = await host.started(), await host.started("db")
    ended = record("n")
    host.starter.attend(vmm, record())
    host.starter.attend(other, ended)
    host.starter.keep("m")
    ended.fail(FerryError(Reason.SHUTTING_DOWN, "as the test says"))
    await host.starter.close()

    assert not is_process(other.process.pid)
    assert (await host.guests.look(vmm.guest)).state == migration_pb2.GUEST_STATE_INCOMING


async def test_a_program_that_has_another_one_start_the_vmm_may_end_well_before_that(host: Host) -> None:
    host.has(template([*SHELL, f'setsid {" ".join(WAITING)} & echo $! >"$0.pid"', "{socket}"]))
    vmm = await host.started()
    pid = int((host.directory / "vmm-web.sock.pid").read_text())

    assert await vmm.process.wait(DEADLINE)
    assert vmm.process.status == 0
    await host.starter.discard(vmm)

    # It is not among the started program's processes: its own API ended it.
    await gone(pid)
    assert not host.guests.knows("web")


# When it does not come up


async def test_a_command_that_ends_early_is_told_with_its_status_and_its_last_words(host: Host) -> None:
    host.has(template([*SHELL, "echo no memory for \"$0\" >&2; printf '\\033[2J'; exit 3", "{guest}", "{socket}"]))
    error = await host.refused()
    assert error.reason is Reason.VMM_FAILED
    assert "status 3" in error.message
    assert error.message.endswith("it said last: no memory for web [2J")
    assert host.files == []


async def test_of_a_long_output_only_the_end_is_told(host: Host) -> None:
    host.has(template([*SHELL, "yes begin | head -n 9999; echo end; exit 1", "{socket}"]))
    message = (await host.refused()).message
    assert message.endswith("begin end")
    assert len(message) < 1000


async def test_a_program_that_is_not_there_is_named(host: Host) -> None:
    host.has(template(["/nowhere/vmm", "{socket}"]))
    error = await host.refused()
    assert error.reason is Reason.VMM_FAILED
    assert "/nowhere/vmm cannot be started" in error.message
    assert host.files == []


async def test_a_vmm_that_does_not_answer_in_time_is_killed_with_all_that_it_started(host: Host) -> None:
    host.has(template([*SHELL, "sleep 1000 & echo $!; wait", "{socket}"], seconds=0.5))
    error = await host.refused()
    assert error.reason is Reason.VMM_UNREACHABLE
    assert "0.5 s" in error.message
    assert "nobody listens" in error.message
    await gone(int(error.message.rpartition(" ")[2]))
    assert host.files == []


async def test_a_vmm_that_runs_a_guest_instead_of_waiting_for_one_is_killed_at_once(host: Host) -> None:
    host.has(template([*SHELL, 'echo $$ >"$0.pid"; exec "$@"', "{socket}", *GUEST]))
    error = await host.refused()
    assert error.reason is Reason.VMM_FAILED
    assert "incoming mode" in error.message
    await gone(int((host.directory / "vmm-web.sock.pid").read_text()))
    assert not host.guests.knows("web")


async def test_a_start_that_is_taken_back_leaves_nothing(host: Host) -> None:
    starter = host.has(template([*SHELL, 'echo $$ >"$0.pid"; exec sleep 1000', "{socket}"]))
    starting = asyncio.create_task(starter.start("web", "vmm"))
    pid = host.directory / "vmm-web.sock.pid"
    await until(lambda: pid.exists() and pid.read_text() != "")

    assert (await host.refused()).reason is Reason.GUEST_BUSY
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await gone(int(pid.read_text()))
    assert host.files == ["vmm-web.sock.pid"]


# Whether one is started at all


@pytest.mark.parametrize("guest_id", ["db-1", "web-", "x/web-1", "-web-1", ".web-1", "web-1\n", "web-" + "1" * 130, ""])
async def test_no_template_fits_a_guest_of_another_name(host: Host, guest_id: str) -> None:
    starter = host.has(template(["/nowhere/vmm", "{socket}"], guests="web-?*"))
    assert await starter.start(guest_id, "vmm") is None
    assert starter.drivers(guest_id) == []


@pytest.mark.parametrize("guest_id", ["-x", "..", ".hidden", "../x"])
async def test_a_name_that_could_be_an_option_or_a_way_out_of_a_directory_fits_none(host: Host, guest_id: str) -> None:
    assert await host.has(template(["/nowhere/vmm", "{socket}"])).start(guest_id, "vmm") is None


async def test_of_the_templates_for_its_kind_of_vmm_the_first_that_fits_is_taken(host: Host) -> None:
    commands = [template([f"/nowhere/{name}", "{socket}"], guests=name, driver=driver) for name, driver in (
        ("*", "qemu"), ("db-*", "vmm"), ("web-*", "vmm"), ("*", "vmm"),
    )]  # fmt: skip
    starter = host.has(*commands)
    assert "/nowhere/web-* cannot" in (await host.refused("web-1")).message
    assert "/nowhere/* cannot" in (await host.refused("mail")).message
    assert starter.drivers("web-1") == ["qemu", "vmm"]
    assert await starter.start("web-1", "firecracker") is None


async def test_a_guest_that_is_registered_has_its_vmm(host: Host) -> None:
    starter = host.has(template(["/nowhere/vmm", "{socket}"]))
    await host.guests.register("web", "vmm", "/run/web.sock", must_answer=False)
    assert await starter.start("web", "vmm") is None


async def test_no_more_wait_for_their_guests_than_may(host: Host) -> None:
    host.has(template(WAITING), most=1)
    vmm = await host.started()
    host.starter.attend(vmm, record())
    assert (await host.refused("db")).reason is Reason.TOO_MANY_MIGRATIONS

    # One whose guest has come does not wait any more.
    host.starter.keep("m")
    await host.starter.discard(await host.started("db"))


async def test_a_vmm_that_nobody_registered_is_not_started_over(host: Host) -> None:
    host.has(template(["/nowhere/vmm", "{socket}"]))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{host.directory}/vmm-web.sock")
        other.listen()
        error = await host.refused()
    assert error.reason is Reason.GUEST_EXISTS
    assert "vmm-web.sock" in error.message


async def test_a_socket_that_was_left_behind_is_not_in_the_way(host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{host.directory}/vmm-web.sock")
    await host.starter.discard(await host.started())
    assert host.files == []


async def test_a_name_too_long_for_a_socket_gets_a_short_one(host: Host) -> None:
    vmm = await host.started("w" * 128)
    assert len(vmm.guest.address) < 108
    await host.starter.discard(vmm)
    assert host.files == []


# What it says


async def test_an_output_that_grows_long_loses_its_beginning(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "MOST_OUTPUT", 100_000)
    output = host.directory / "output"
    command = [*SHELL, 'yes begin | head -n 50000; echo said; read line <"$0"; echo more', f"{host.directory}/go"]
    os.mkfifo(host.directory / "go")
    process = await launched.Launched.start(command, output)
    await until(lambda: output.read_bytes().endswith(b"said\n"))

    process.trim()
    assert output.stat().st_size == 64 << 10
    (host.directory / "go").write_text("\n")
    assert await process.wait(DEADLINE)
    # What it writes later lands behind what was kept.
    assert process.tail().endswith("begin said more")
    assert output.stat().st_size == (64 << 10) + len("more\n")
    process.close()
    assert not output.exists()
