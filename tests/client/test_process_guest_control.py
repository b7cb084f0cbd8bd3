"""The terminal of a guest: commands that come in pieces or make no sense, and readers that are slow or gone."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from guest_process import GuestProcess

from pageferry.v1 import vmm_pb2

SMALL = ("--memory", "1M")


async def test_an_unknown_command_is_answered_and_harmless(short_path: Path) -> None:
    async with GuestProcess(short_path / "a.sock", *SMALL) as guest:
        await guest.say("dance")

        assert (await guest.event("error"))["message"] == "unknown command 'dance': verify, status or quit"
        assert (await guest.verify())["bad"] == 0


async def test_commands_may_come_in_pieces_and_several_at_once(short_path: Path) -> None:
    async with GuestProcess(short_path / "a.sock", *SMALL) as guest:
        guest.process.stdin.write(b"sta")
        await guest.process.stdin.drain()
        await guest.event("progress")
        guest.process.stdin.write(b"tus\n\n status \nverify\nqui")
        guest.process.stdin.write_eof()

        await guest.event("status")
        await guest.event("status")
        assert (await guest.event("error"))["message"].startswith("unknown command 'qui'")
        assert await guest.exit_code() == 0


async def test_only_one_verification_is_under_way_at_a_time(short_path: Path) -> None:
    async with GuestProcess(short_path / "a.sock", "--memory", "64M") as guest:
        guest.process.stdin.write(b"verify\nverify\n")

        assert (await guest.event("error"))["message"] == "a verification is under way already"
        assert (await guest.event("verified"))["bad"] == 0


async def test_a_detached_guest_goes_on_when_nobody_can_read_its_events(short_path: Path) -> None:
    async with GuestProcess(short_path / "a.sock", *SMALL, "--detach") as guest:
        # The transport of the pipe, and with it this end of the pipe itself.
        guest.process._transport.get_pipe_transport(1).close()
        await guest.say("status")
        await guest.say("verify")

        await guest.vmm.Pause(vmm_pb2.PauseRequest())
        described = await guest.vmm.DescribeMemory(vmm_pb2.DescribeMemoryRequest())

        assert described.state == vmm_pb2.VMM_STATE_PAUSED


@pytest.mark.parametrize("commands", ["", "verify\n", "status"], ids=["nothing", "a verification", "no newline"])
async def test_commands_may_come_from_a_file_whose_end_ends_the_guest(short_path: Path, commands: str) -> None:
    script = short_path / "commands"
    script.write_text(commands)
    guest = GuestProcess(short_path / "a.sock", *SMALL)
    with script.open() as stdin:
        process = await asyncio.create_subprocess_exec(*guest._command, stdin=stdin, stdout=subprocess.PIPE)
        out, _ = await asyncio.wait_for(process.communicate(), 30)

    events = out.decode().splitlines()
    assert '"ready"' in events[0]
    assert '"bye"' in events[-1]
    assert process.returncode == 0
